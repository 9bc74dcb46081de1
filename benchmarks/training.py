"""Seconds of a training step against stock `transformers` T5: `python -m benchmarks.training`, on a GPU where there is one.

T5-small shapes, rows of 512 + 114 tokens, float32 weights under bf16 autocast (with `--precision fp32` without it, for processors that
have no bf16), forward + backward + fused AdamW, dropout 0 and 0.1. Ours (as written, with compiled blocks, and on a GPU recorded as a
CUDA graph) and the stock variants (eager, sdpa, each with and without `torch.compile`, which on a GPU can record graphs too) take
turns, each in its own process and all with the memory allocator of our training loop; the median of the rounds counts, and the fastest
of ours is set against the fastest of stock. The matrix products of a step are timed alone beside them. The last line is one JSON object.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
import transformers
from transformers import T5Config

from benchmarks.device import DEVICE, ON_GPU, synchronize
from src.compilation import compile_blocks
from src.cuda_graphs import RecordedPass
from src.environment import device_name, keep_freed_memory
from src.inference import to_device
from src.modeling_t5 import T5ForConditionalGeneration
from src.precision import DTYPES

CALLS = 10 if ON_GPU else 1  # timed together: a step takes seconds on a CPU and milliseconds on a GPU
SOURCE, TARGET = 512, 114
OURS = ("ours", "ours+compile", *(["ours+compile+graph"] if ON_GPU else []))
STOCK = ("eager", "sdpa", "eager+compile", "sdpa+compile", *(["eager+compile+graph", "sdpa+compile+graph"] if ON_GPU else []))


def seconds_of(work: Callable[..., object], *arguments: object) -> float:
    """Seconds of one call, the mean of `CALLS`, until the device has finished."""
    synchronize()
    started = time.perf_counter()
    for _ in range(CALLS):
        work(*arguments)
    synchronize()
    return (time.perf_counter() - started) / CALLS


def median_seconds(work: Callable[..., object], *arguments: object) -> float:
    """Seconds of one call, the median of three measurements after one that warms up."""
    return statistics.median([seconds_of(work, *arguments) for _ in range(4)][1:])


def build(kind: str, dropout: float, vocab_size: int) -> torch.nn.Module:
    """One of ours or a stock variant on the device, with the same random weights."""
    config = T5Config(vocab_size=vocab_size, dropout_rate=dropout, decoder_start_token_id=0, use_cache=False)
    torch.manual_seed(0)
    ours = T5ForConditionalGeneration(config).train()
    attention, *options = kind.split("+")
    if attention == "ours":
        ours.to(DEVICE)  # first: what compiling needs depends on the device
        if "compile" in options:
            compile_blocks(ours)
        return ours
    stock = transformers.T5ForConditionalGeneration(config).train()
    stock.set_attn_implementation(attention)
    stock.load_state_dict(ours.state_dict())
    stock.to(DEVICE)
    mode = "reduce-overhead" if "graph" in options else "default"
    return torch.compile(stock, mode=mode) if "compile" in options else stock


class Step:
    """One kind's model, optimizer and batch; calling it takes an optimizer step."""

    def __init__(self, kind: str, options: argparse.Namespace) -> None:
        self.model = build(kind, options.dropout, options.vocab_size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(1)
        shapes = {"input_ids": (options.rows, SOURCE), "labels": (options.rows, TARGET)}
        batch = {name: torch.randint(2, options.vocab_size, shape, generator=generator) for name, shape in shapes.items()}
        if ON_GPU and kind in OURS:  # one segment a row, as in a full window of pre-training: what our GPU kernel asks for
            batch["encoder_segment_ids"], batch["decoder_segment_ids"] = (torch.ones_like(ids) for ids in tuple(batch.values()))
        self.batch = to_device(batch, self.model)
        self.dtype = DTYPES[options.precision]
        self.is_recorded = kind in OURS and kind.endswith("graph")
        self.run = RecordedPass(self.gradients, self.batch) if self.is_recorded else self.gradients

    def gradients(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(DEVICE.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(**batch).loss
        loss.backward()
        return loss.detach()

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=not self.is_recorded)
        self.run(self.batch)
        self.optimizer.step()


def products(config: T5Config, rows: int) -> list[tuple[int, tuple, tuple]]:
    """(count, left shape, right shape) of the matrix products a b^T of a forward pass."""
    width, inner, hidden, heads, d_kv = config.d_model, config.num_heads * config.d_kv, config.d_ff, config.num_heads, config.d_kv
    source, target, layers, decoders = rows * SOURCE, rows * TARGET, config.num_layers, config.num_decoder_layers
    linear = [
        (4 * layers + 2 * decoders, (source, width), (inner, width)),  # encoder q k v o, cross k v
        (6 * decoders, (target, width), (inner, width)),
        (layers, (source, width), (hidden, width)),
        (layers, (source, hidden), (width, hidden)),
        (decoders, (target, width), (hidden, width)),
        (decoders, (target, hidden), (width, hidden)),
        (1, (target, width), (config.vocab_size, width)),
    ]
    pairs = ((layers, SOURCE, SOURCE), (decoders, TARGET, TARGET), (decoders, TARGET, SOURCE))
    calls, batch = (1, rows * heads) if ON_GPU else (rows, heads)  # a CPU does best row by row, in its cache
    scores = [(count * calls, (batch, q, d_kv), (batch, k, d_kv)) for count, q, k in pairs]
    context = [(count * calls, (batch, q, k), (batch, d_kv, k)) for count, q, k in pairs]
    return [*linear, *scores, *context]


def seconds_of_products(config: T5Config, rows: int, dtype: torch.dtype) -> float:
    """Seconds that the products of one step need: each a b^T, and its two gradients."""
    total = 0.0
    for count, left, right in products(config, rows):
        a, b = (torch.randn(shape, device=DEVICE).to(dtype) for shape in (left, right))
        total += count * median_seconds(lambda a, b, out: (torch.matmul(a, b.mT, out=out), out @ b, out.mT @ a), a, b, a @ b.mT)
    return total


def utilisation(config: T5Config, rows: int, seconds: float, peer_seconds: float) -> dict[str, float]:
    """Share of the rate of one large bf16 product that the products of a step reach, causal attention counted in full; that rate."""
    a, b, out = (torch.randn(8192, 8192, device=DEVICE).bfloat16() for _ in range(3))
    rate = 2 * 8192**3 / median_seconds(lambda: torch.matmul(a, b, out=out))
    flops = 3 * sum(2 * count * math.prod(left) * right[-2] for count, left, right in products(config, rows))  # backward is twice forward
    return {"mfu": flops / seconds / rate, "peer_mfu": flops / peer_seconds / rate, "matmul_tflops": rate / 1e12}


def start(kind: str, dropout: float, options: argparse.Namespace) -> subprocess.Popen:
    """A process that holds one kind and takes steps when asked, so that kinds share neither memory nor its peak."""
    values = {"serve": kind, "dropout": dropout, "rows": options.rows, "vocab-size": options.vocab_size, "threads": options.threads}
    values |= {"precision": options.precision}
    command = [sys.executable, "-m", "benchmarks.training", *(f"--{name}={value}" for name, value in values.items())]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)


def serve(kind: str, options: argparse.Namespace) -> None:
    """For every line read take `CALLS` steps and print what `step_together` returns; a stock kind that fails prints why."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a compiler prints is no answer
    keep_freed_memory()
    try:
        step = Step(kind, options)
        for turn, _ in enumerate(sys.stdin):
            if ON_GPU and turn == 1:  # what compiling took does not count
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            seconds = seconds_of(step)
            peak = torch.cuda.max_memory_reserved() if ON_GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(seconds, peak / 1e6, file=answers)
    except Exception as error:
        if kind in OURS:
            raise
        print(f"error: {type(error).__name__}:", str(error).strip().partition("\n")[0], file=answers)


def step_together(workers: dict[str, subprocess.Popen], kinds: Iterable[str]) -> dict[str, tuple[float, float]]:
    """(seconds of a step, peak MB: resident so far on a CPU, held since compiling on a GPU) of the kinds still among `workers`.

    All are asked at once. A stock kind that fails is reported and leaves `workers`; one of ours raises RuntimeError.
    """
    kinds, answers = [kind for kind in kinds if kind in workers], {}
    for kind in kinds:
        with suppress(BrokenPipeError):  # a process that has ended gives no answer
            workers[kind].stdin.write("step\n")
    for kind in kinds:
        line = workers[kind].stdout.readline()
        if line and not line.startswith("error"):
            answers[kind] = tuple(map(float, line.split()))
            continue
        process = workers.pop(kind)
        process.communicate()  # until it has left its memory to the others
        failure = f"{kind}: {line.strip() or f'the process ended early (exit status {process.returncode})'}"
        if kind in OURS:
            raise RuntimeError(failure)
        print(f"left out: {failure}", file=sys.stderr, flush=True)
    return answers


def compare(dropout: float, options: argparse.Namespace) -> dict:
    """Median seconds of every kind in alternating rounds, the matrix products in the same rounds, and peak memory."""
    kinds, config = (*OURS, *options.stock), T5Config(vocab_size=options.vocab_size)
    workers = {kind: start(kind, dropout, options) for kind in kinds}
    seconds, peaks, alone = {kind: [] for kind in kinds}, {}, []
    for together in [kinds] if ON_GPU else [(kind,) for kind in kinds]:  # the machine of a GPU has cores for all compilers at once
        step_together(workers, together), step_together(workers, together)  # compile, and fill the optimizer's state
    for turn in range(options.rounds):
        for kind in kinds if turn % 2 == 0 else kinds[::-1]:
            for name, (spent, peak) in step_together(workers, (kind,)).items():
                seconds[name].append(spent)
                peaks[name] = peak
        alone.append(seconds_of_products(config, options.rows, DTYPES[options.precision]))
        print(f"dropout {dropout} round {turn}: " + "  ".join(f"{kind} {seconds[kind][-1]:.3g} s" for kind in workers), flush=True)
    for worker in workers.values():
        worker.communicate()  # ends what it reads, and so the process
    stock = [kind for kind in options.stock if kind in workers]
    if not stock:
        raise RuntimeError(f"no stock variant ran at dropout {dropout}")
    medians, peaks = {kind: statistics.median(seconds[kind]) for kind in workers}, {kind: peaks[kind] for kind in workers}
    best, peer = (min(names, key=medians.__getitem__) for names in (OURS, stock))
    ratio = medians[peer] / medians[best]
    return {"seconds": medians, "peak_mb": peaks, "best": best, "peer": peer, "ratio": ratio, "products_s": statistics.median(alone)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=64 if ON_GPU else 8)
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--stock", nargs="+", choices=STOCK, default=STOCK)
    parser.add_argument("--vocab-size", type=int, default=32128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--dropout", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    if options.serve:
        return serve(options.serve, options)
    results = {f"dropout{dropout:g}".replace(".", ""): compare(dropout, options) for dropout in options.dropouts}  # "dropout0", "dropout01"
    first, tokens = next(iter(results.values())), options.rows * (SOURCE + TARGET)
    seconds, peer_seconds = (first["seconds"][first[kind]] for kind in ("best", "peer"))
    report = {f"speed_ratio_{name}": result["ratio"] for name, result in results.items()}
    report |= {"gemm_fraction": first["products_s"] / seconds, "tokens_per_s": tokens / seconds, "peer_tokens_per_s": tokens / peer_seconds}
    report |= {
        "peak_mb": first["peak_mb"][first["best"]],
        "peer_peak_mb": first["peak_mb"][first["peer"]],
        "products_s": first["products_s"],
    }
    if ON_GPU:
        report |= utilisation(T5Config(vocab_size=options.vocab_size), options.rows, seconds, peer_seconds)
    setting = {"rows": options.rows, "threads": options.threads, "precision": options.precision, "device": device_name()}
    print(json.dumps(report | results | setting))


if __name__ == "__main__":
    main()
