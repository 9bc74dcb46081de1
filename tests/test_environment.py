"""The first cell of a notebook installs what is missing and never touches torch."""

from src import environment


def test_missing_and_old_packages_are_found_and_torch_is_kept(tmp_path, monkeypatch):
    """Replacing Colab's torch breaks its driver match; a package that is too old fails much later and obscurely."""
    versions = {"torch": "2.0.0", "transformers": "5.15.0", "peft": "0.1"}
    monkeypatch.setattr(environment, "installed", versions.get)
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# floors\ntorch>=2.6\ntransformers>=5.15  # T5\npeft>=0.18\nbitsandbytes>=0.49\n")
    assert environment.missing_requirements(requirements) == ["peft>=0.18", "bitsandbytes>=0.49"]


def test_this_environment_has_all_it_needs():
    """`make` must install everything that the notebooks' first cell asks for."""
    assert environment.missing_requirements() == []


def test_the_report_names_versions_device_and_precision():
    """A bug report starts with this table."""
    text = environment.report()
    assert all(word in text for word in (*environment.PACKAGES, "device", "precision"))
