"""Folds, shares of the labels, and what a job trains on."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src import cross_validation
from src.profiles import settings_for
from src.verified_folders import atomic_folder


def test_every_text_is_judged_once_and_no_group_is_on_both_sides():
    """A near duplicate in train and test makes every score a little too good."""
    rows = cross_validation.labelled_rows("sample", settings_for("sample").labelled)
    judged = []
    for rest, test in cross_validation.folds_of(rows, 5, seed=0):
        assert not set(rest["group"]) & set(test["group"])
        assert len(rest) + len(test) == len(rows)
        judged += test["text_id"].tolist()
    assert sorted(judged) == sorted(rows["text_id"])
    assert len(set(judged)) == len(judged)


def test_a_share_of_the_labels_keeps_groups_and_classes():
    """A label-efficiency curve from unbalanced or leaking shares compares something else."""
    rows = cross_validation.labelled_rows("sample", settings_for("sample").labelled)
    part, rest = cross_validation.part_of(rows, 0.1, seed=0)
    assert len(part) == pytest.approx(0.1 * len(rows), rel=0.1)
    assert not set(part["group"]) & set(rest["group"])
    shares = [frame["label"].value_counts(normalize=True).sort_index().to_numpy() for frame in (part, rows)]
    assert np.allclose(*shares, atol=0.03)


def test_few_labels_are_read_more_often():
    """Five passes over two per cent of the labels end within the warm-up: the curve would compare untrained models."""
    settings = settings_for("mini")
    runner = cross_validation.Runner(Path(), Path(), {"classification": settings.classification}, settings.adaptation)
    jobs = [cross_validation.Job("pretrained_head", 0, 0, fraction=fraction) for fraction in (1.0, 0.5, 0.02)]
    assert [runner.settings_of(job).max_epochs for job in jobs] == [5, 10, 50]


def test_labels_are_held_out_only_as_far_as_they_are_needed(monkeypatch):
    """Each label held out is one that TF-IDF learns from and the model does not; a few choose no rate, and no weights either."""
    settings, seen = settings_for("mini"), {}
    rows = cross_validation.labelled_rows("sample", settings_for("sample").labelled)
    few, many = rows[:2_000], pd.concat([rows, rows])

    def watched(task, folder, splits, settings, *arguments, **options):
        seen["train"], seen["held out"], seen["settings"] = len(splits["train"]), len(splits["validation"]), settings
        raise KeyboardInterrupt

    monkeypatch.setattr(cross_validation, "finetune", watched)
    runner = cross_validation.Runner(Path(), Path(), {"classification": settings.classification}, settings.adaptation)
    for judged, labelled, expected in (("test", few, 60), ("test", many, 0.02 * len(many)), ("validation", few, 200)):
        labelled = labelled.assign(group=range(len(labelled)))  # the sample's groups are larger than sixty texts
        with pytest.raises(KeyboardInterrupt):
            runner.judge(cross_validation.Job("pretrained_head", 0, 0, judged=judged), labelled, labelled, Path())
        assert seen["held out"] == pytest.approx(expected, rel=0.1)
        assert seen["train"] + seen["held out"] == len(labelled)
        assert seen["settings"].evaluate_every > 10**6
    with pytest.raises(KeyboardInterrupt):
        runner.judge(cross_validation.Job("pretrained_head", 0, 0, fraction=0.05), few[:100], few, Path())
    assert seen["train"] == 100  # the curve gives TF-IDF as many


def test_jobs_of_another_version_are_told_in_one_line(tmp_path, recwarn):
    """A comparison asks for each of its hundred jobs, some twice: as many warnings hide what the command is there to show."""
    job = cross_validation.Job("pretrained_head", 0, 0)
    for name in ("first", "second"):
        with atomic_folder(tmp_path / name, {"code": "another"}) as folder:
            (folder / "costs.json").write_text("{}")
        for _ in range(2):
            with warnings.catch_warnings():  # forgets which warnings were shown
                assert cross_validation.read_finished(job, tmp_path / name) is not None
    assert len([one for one in recwarn if "another version of the code" in str(one.message)]) == 1
