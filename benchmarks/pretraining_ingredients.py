"""What each ingredient of the pre-training recipe is worth: `python -m benchmarks.pretraining_ingredients --minutes 4`.

The default recipe, the T5 paper's, and the default with one thing changed each, on the same tokens of the same clock: all take turns
in slices of half a minute. Nothing is compiled: each change would compile anew. A few minutes show how a recipe starts, not how it
ends. Reads what `benchmarks.pretraining_recipe` reads. The last line is one JSON object, a recipe a key.
"""

import json

from benchmarks.pretraining_recipe import Contestant, Corpus, own_recipe, paper_recipe, parse_arguments, take_turns
from src.config import TrainingSettings
from src.profiles import Settings, settings_for

# By what is changed; a change of shape keeps the number of parameters, within 2 %, for the widths of `mini`.
CHANGES = {
    "T5's weights at random": {"pretraining.initialisation": "t5"},
    "AdamW scaled by RMS": {
        "pretraining.optimizer": "adamw_rms_scaled",
        "pretraining.learning_rate": TrainingSettings.learning_rate,
        "pretraining.other_rate": TrainingSettings.other_rate,
        "pretraining.weight_decay": TrainingSettings.weight_decay,
    },
    "the paper's Adafactor": {"pretraining.optimizer": "adafactor_t5"},
    "inverse square root schedule": {"pretraining.schedule": "inverse_sqrt"},
    "dropout 0.1": {"model.dropout_rate": 0.1},
    "windows of the stream": {"pretraining.packing": "concatenate", "pretraining.labelled_share": 0.0},
    "rows of 128 tokens": {
        "pretraining.inputs_length": 128,
        "pretraining.targets_length": 31,
        "pretraining.rows_per_step": 64,
        "pretraining.rows_per_micro_batch": 32,
    },
    "32 rows a step": {"pretraining.rows_per_step": 32},
    "gated feed-forward": {"model.feed_forward_proj": "gated-gelu", "model.d_ff": 683},
    "3 + 2 wide layers": {
        "model.d_model": 384,
        "model.num_heads": 6,
        "model.d_ff": 1536,
        "model.num_layers": 3,
        "model.num_decoder_layers": 2,
    },
    "10 + 3 layers": {"model.num_layers": 10, "model.num_decoder_layers": 3},
    "three tenths labelled sentences": {"pretraining.labelled_share": 0.3},
}


def recipes(settings: Settings, corpus: Corpus) -> list[Contestant]:
    """The default, the paper's, and the default with each of `CHANGES`."""
    changed = {name: settings_for(settings.profile, {**settings.overrides, **change}) for name, change in CHANGES.items()}
    ours = [own_recipe(name, each, corpus) for name, each in {"default": settings, **changed}.items()]
    return [*ours, paper_recipe("the paper's recipe, stock T5", settings, corpus)]


def main() -> None:
    options, settings = parse_arguments(__doc__, 4.0)
    settings = settings_for(settings.profile, {**settings.overrides, "pretraining.compile": False})
    corpus = Corpus.of(settings)
    contestants = recipes(settings, corpus)
    take_turns(contestants, settings, corpus, options)
    ranked = sorted(contestants, key=lambda each: each.curve[-1]["validation_loss_without_sentinels"])
    print(json.dumps({"minutes": options.minutes, "threads": options.threads} | {each.name: figures(each) for each in ranked}))


def figures(contestant: Contestant) -> dict[str, float]:
    last = contestant.curve[-1]
    losses = {key: round(value, 4) for key, value in last.items() if key.startswith("validation")}
    return losses | {"tokens": contestant.tokens, "parameters": contestant.model.num_parameters()}


if __name__ == "__main__":
    main()
