"""Memory, speed and accuracy of the decoding caches, measured side by side: `python -m benchmarks.decoding [--cases headline|all]`.

T5-small shapes with random weights. Tokens/s count the decoding of a batch from its encoder output on, which for `kv` includes
making K and V of the source. Kinds take turns in one process, and the median of the rounds is kept. Stock `transformers` with its
own cache is timed beside them. The last line is one JSON object: ratios of `x+e` to `kv` and to stock in the headline cases (source 512,
target 114), errors of all kinds, and with `--cases all` the ratios of the whole grid.
"""

import argparse
import itertools
import json
import statistics
import time

import torch
import transformers
from transformers import T5Config
from transformers.modeling_outputs import BaseModelOutput

from benchmarks.device import DEVICE, synchronize
from src.environment import device_name
from src.kv_cache import CACHE_KINDS
from src.modeling_t5 import T5ForConditionalGeneration
from src.precision import DTYPES

SOURCES, TARGETS, BATCHES = (40, 512, 2048), (4, 114, 512), (1, 8, 64)
PRECISIONS = ("bf16", "fp32")
HEADLINE = [(512, 114, 64, "bf16"), (512, 114, 1, "bf16"), (512, 114, 64, "fp32"), (512, 114, 1, "fp32")]


def build(config: T5Config, dtype: torch.dtype, model_class: type = T5ForConditionalGeneration) -> torch.nn.Module:
    """The same random weights for every class and dtype."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    if model_class is not T5ForConditionalGeneration:
        other = model_class(config).eval()
        other.load_state_dict(model.state_dict())
        model = other
    return model.to(DEVICE, dtype)


@torch.no_grad()
def decode(model, kind: str, encoder_states: torch.Tensor, target: int) -> tuple[float, int]:
    """Greedy steps without early stop: (seconds, bytes of the cache at the end)."""
    is_stock = kind == "stock"
    synchronize()
    started = time.perf_counter()
    cache = None if is_stock else model.new_cache(kind, target)
    ids = torch.zeros(len(encoder_states), 1, dtype=torch.long, device=DEVICE)
    for _ in range(target):
        outputs = BaseModelOutput(last_hidden_state=encoder_states)
        step = model(decoder_input_ids=ids, encoder_outputs=outputs, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        ids = step.logits[:, -1:].argmax(-1)
    synchronize()
    seconds = time.perf_counter() - started
    return seconds, stock_bytes(cache) if is_stock else cache.num_bytes()


def stock_bytes(cache) -> int:
    layers = (*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers)
    return sum(tensor.untyped_storage().nbytes() for layer in layers for tensor in (layer.keys, layer.values))


def time_case(models: dict, source: int, target: int, batch: int, rounds: int, longest: float) -> list[dict]:
    """Tokens/s and bytes of every kind, in alternating rounds; a case stops when `longest` seconds are spent."""
    config, dtype = models["ours"].config, models["ours"].dtype
    generator = torch.Generator().manual_seed(source + target)
    ids = torch.randint(2, config.vocab_size, (batch, source), generator=generator).to(DEVICE)
    with torch.no_grad():
        states = torch.cat([models["ours"].encoder(part).last_hidden_state for part in ids.split(8)]).to(dtype)
        models["ours"].calibrate_key_cache(ids)
    kinds = (*CACHE_KINDS, "stock")
    seconds, size, started = {kind: [] for kind in kinds}, {}, time.perf_counter()
    for turn in range(rounds):
        for kind in kinds if turn % 2 == 0 else kinds[::-1]:
            model = models["stock" if kind == "stock" else "ours"]
            spent, size[kind] = decode(model, kind, states, target)
            seconds[kind].append(spent)
        if time.perf_counter() - started > longest:
            break
    rows = []
    for kind in kinds:
        median = statistics.median(seconds[kind])
        rows.append({"kind": kind, "cache_bytes": size[kind], "tokens_per_s": batch * target / median, "rounds": len(seconds[kind])})
    return rows


@torch.no_grad()
def logit_errors(config: T5Config, source: int, target: int, batch: int) -> dict[str, dict[str, float]]:
    """Largest error of a logit against float64 weights and arithmetic, teacher-forced, by dtype and kind."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, config.vocab_size, (batch, source), generator=generator).to(DEVICE)
    forced = torch.randint(2, config.vocab_size, (batch, target), generator=generator).to(DEVICE)
    errors: dict[str, dict[str, float]] = {}
    for name in PRECISIONS:
        dtype = DTYPES[name]
        model = build(config, dtype)
        exact = build(config, dtype).double()  # the rounded weights in exact arithmetic: the error of running, not of storing
        states = exact.encoder(ids).last_hidden_state
        outputs = BaseModelOutput(last_hidden_state=states.to(dtype))
        exact_outputs = BaseModelOutput(last_hidden_state=states.to(dtype).double())
        expected = exact(decoder_input_ids=forced, encoder_outputs=exact_outputs).logits
        model.calibrate_key_cache(ids)
        errors[name] = {}
        for kind in CACHE_KINDS:
            cache, worst = model.new_cache(kind, target), 0.0
            for step in range(target):
                logits = model(decoder_input_ids=forced[:, step : step + 1], encoder_outputs=outputs, past_key_values=cache).logits
                worst = max(worst, float((logits.double() - expected[:, step : step + 1]).abs().max()))
            errors[name][kind] = worst
    return errors


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", choices=("headline", "all"), default="headline", help="all: the whole grid, up to two hours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--longest", type=float, default=60.0, help="seconds after which a case starts no further round")
    parser.add_argument("--vocab-size", type=int, default=32128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    config = T5Config(vocab_size=options.vocab_size, num_layers=options.layers, decoder_start_token_id=0, dropout_rate=0.0)
    grid = HEADLINE if options.cases == "headline" else list(itertools.product(SOURCES, TARGETS, BATCHES, PRECISIONS))
    models = {
        name: {"ours": build(config, DTYPES[name]), "stock": build(config, DTYPES[name], transformers.T5ForConditionalGeneration)}
        for name in PRECISIONS
    }
    cases = []
    for source, target, batch, dtype in grid:
        rows = time_case(models[dtype], source, target, batch, options.rounds, options.longest)
        for row in rows:
            cases.append({"source": source, "target": target, "batch": batch, "dtype": dtype, **row})
            print(
                f"source {source} target {target} batch {batch} {dtype} {row['kind']:>5}: {row['cache_bytes'] / 1e6:9.2f} MB "
                f"{row['tokens_per_s']:9.1f} tokens/s",
                flush=True,
            )
    errors = logit_errors(config, 512, 114, 2)
    print(f"largest logit error: {errors}")
    found = headline(cases, errors) | {"logit_errors": errors} | (over_the_grid(cases) if options.cases == "all" else {})
    print(json.dumps({**found, "device": device_name(), "cases": cases}))


def ratios(cases: list[dict], key: str, peer: str = "kv") -> dict[tuple[int, int, int, str], float]:
    """That figure of `x+e` divided by the one of `peer`, for every (source, target, batch, dtype)."""
    found = {(c["source"], c["target"], c["batch"], c["dtype"], c["kind"]): c[key] for c in cases}
    return {case[:4]: value / found[*case[:4], peer] for case, value in found.items() if case[4] == "x+e"}


def headline(cases: list[dict], errors: dict) -> dict[str, float]:
    """Ratios of `x+e` to `kv`, and of speed to stock, at source 512, target 114."""
    found = {"cache_ratio": 1 / ratios(cases, "cache_bytes")[512, 114, 64, "bf16"]}
    for name, peer in (("speed", "kv"), ("stock", "stock")):
        speed = ratios(cases, "tokens_per_s", peer)
        for case in HEADLINE:
            found[f"{name}_ratio_b{case[2]}" + ("" if case[3] == "bf16" else f"_{case[3]}")] = speed[case]
    return found | {"error_ratio_bf16": errors["bf16"]["x+e"] / errors["bf16"]["kv"]}


def over_the_grid(cases: list[dict]) -> dict[str, dict[str, float]]:
    """How much smaller and faster `x+e` is than `kv`, and faster than stock: a measure of `{"40_to_4": ratio}`, source to target, each."""
    measures: dict[str, dict[str, float]] = {"smaller": {}}
    for name, peer in (("faster", "kv"), ("faster_than_stock", "stock")):
        for (source, target, batch, dtype), ratio in ratios(cases, "tokens_per_s", peer).items():
            measures.setdefault(f"{name}_{dtype}_batch_{batch}", {})[f"{source}_to_{target}"] = ratio
    for (source, target, _, _), ratio in ratios(cases, "cache_bytes").items():
        measures["smaller"][f"{source}_to_{target}"] = 1 / ratio  # the same for every batch and dtype
    return measures


if __name__ == "__main__":
    main()
