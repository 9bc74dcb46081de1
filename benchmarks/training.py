"""Seconds of a training step against stock `transformers` T5: `python -m benchmarks.training`.

T5-small shapes, 8 rows of 512 + 114 tokens, float32 weights under bf16 autocast, forward + backward + fused AdamW, dropout 0 and
0.1. Ours (as written, and with compiled blocks) and the stock variants (eager, sdpa, each with and without `torch.compile`) take
turns, each in its own process and all with the memory allocator of our training loop; the median of the rounds counts, and the fastest
of ours is set against the fastest of stock. The matrix products of a step are timed alone beside them. The last line is one JSON object.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
import transformers
from transformers import T5Config

from src.compilation import compile_blocks
from src.environment import keep_freed_memory
from src.modeling_t5 import T5ForConditionalGeneration

ROWS, SOURCE, TARGET = 8, 512, 114
OURS = ("ours", "ours+compile")
STOCK = ("eager", "sdpa", "eager+compile", "sdpa+compile")


def build(kind: str, dropout: float, vocab_size: int) -> torch.nn.Module:
    """One of ours or a stock variant, with the same random weights."""
    config = T5Config(vocab_size=vocab_size, dropout_rate=dropout, decoder_start_token_id=0)
    torch.manual_seed(0)
    ours = T5ForConditionalGeneration(config).train()
    attention, _, compiled = kind.partition("+")
    if attention == "ours":
        if compiled:
            compile_blocks(ours)
        return ours
    stock = transformers.T5ForConditionalGeneration(config).train()
    stock.set_attn_implementation(attention)
    stock.load_state_dict(ours.state_dict())
    return torch.compile(stock) if compiled else stock


class Step:
    """One kind's model, optimizer and batch; calling it runs a step and returns its seconds."""

    def __init__(self, kind: str, dropout: float, vocab_size: int) -> None:
        self.model = build(kind, dropout, vocab_size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(1)
        self.input_ids = torch.randint(2, vocab_size, (ROWS, SOURCE), generator=generator)
        self.labels = torch.randint(2, vocab_size, (ROWS, TARGET), generator=generator)

    def __call__(self) -> float:
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(input_ids=self.input_ids, labels=self.labels).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


def products(config: T5Config) -> list[tuple[int, tuple, tuple]]:
    """(count, left shape, right shape) of the matrix products of a forward pass."""
    width, inner, hidden, heads, d_kv = config.d_model, config.num_heads * config.d_kv, config.d_ff, config.num_heads, config.d_kv
    source, target, layers, decoders = ROWS * SOURCE, ROWS * TARGET, config.num_layers, config.num_decoder_layers
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
    scores = [(count * ROWS, (heads, q, d_kv), (heads, k, d_kv)) for count, q, k in pairs]
    context = [(count * ROWS, (heads, q, k), (heads, d_kv, k)) for count, q, k in pairs]
    return [*linear, *scores, *context]


def seconds_of_products(config: T5Config) -> float:
    """Seconds that the products of one step need: each a b^T, and its two gradients."""
    total = 0.0
    for count, left, right in products(config):
        a, b = torch.randn(left).bfloat16(), torch.randn(right).bfloat16()
        gradient = a @ b.mT
        spent = []
        for _ in range(4):
            started = time.perf_counter()
            torch.matmul(a, b.mT, out=gradient)
            torch.matmul(gradient, b), torch.matmul(gradient.mT, a)
            spent.append(time.perf_counter() - started)
        total += count * statistics.median(spent[1:])
    return total


class Worker:
    """A process that holds one kind and makes a step when asked, so that kinds share neither memory nor its peak."""

    def __init__(self, kind: str, dropout: float, options: argparse.Namespace) -> None:
        arguments = ["--serve", kind, "--dropout", str(dropout), "--vocab-size", str(options.vocab_size), "--threads", str(options.threads)]
        command = [sys.executable, "-m", "benchmarks.training", *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> tuple[float, float]:
        """(seconds of one step, peak resident megabytes so far)."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of a benchmark ended early (exit status {self.process.wait()})")
        seconds, peak_mb = line.split()
        return float(seconds), float(peak_mb)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(kind: str, options: argparse.Namespace) -> None:
    """Make a step for every line read, and print what `Worker.step` returns."""
    keep_freed_memory()
    step = Step(kind, options.dropout, options.vocab_size)
    for _ in sys.stdin:
        seconds = step()
        print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)


def compare(dropout: float, options: argparse.Namespace) -> dict:
    """Median seconds of every kind in alternating rounds, the matrix products in the same rounds, and peak memory."""
    ours = OURS if dropout == 0 else OURS[:1]  # blocks with dropout are not compiled on a CPU
    workers = {kind: Worker(kind, dropout, options) for kind in (*ours, *options.stock)}
    seconds, peaks, alone = {kind: [] for kind in workers}, {}, []
    for worker in workers.values():
        worker.step(), worker.step()  # compile, and fill the optimizer's state
    for turn in range(options.rounds):
        for kind in list(workers) if turn % 2 == 0 else list(workers)[::-1]:
            spent, peaks[kind] = workers[kind].step()
            seconds[kind].append(spent)
        alone.append(seconds_of_products(T5Config(vocab_size=options.vocab_size)))
        print(f"dropout {dropout} round {turn}: " + "  ".join(f"{kind} {spent[-1]:.2f} s" for kind, spent in seconds.items()), flush=True)
    for worker in workers.values():
        worker.close()
    medians = {kind: statistics.median(spent) for kind, spent in seconds.items()}
    best, peer = (min(kinds, key=medians.__getitem__) for kinds in (ours, options.stock))
    ratio = medians[peer] / medians[best]
    return {"seconds": medians, "peak_mb": peaks, "best": best, "peer": peer, "ratio": ratio, "products_s": statistics.median(alone)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
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
    results = {dropout: compare(dropout, options) for dropout in (0.0, 0.1)}
    plain, dropped, tokens = results[0.0], results[0.1], ROWS * (SOURCE + TARGET)
    report = {
        "speed_ratio_dropout0": plain["ratio"],
        "speed_ratio_dropout01": dropped["ratio"],
        "gemm_fraction": plain["products_s"] / plain["seconds"][plain["best"]],
        "tokens_per_s": tokens / plain["seconds"][plain["best"]],
        "peer_tokens_per_s": tokens / plain["seconds"][plain["peer"]],
        "peak_mb": plain["peak_mb"][plain["best"]],
        "peer_peak_mb": plain["peak_mb"][plain["peer"]],
        "products_s": plain["products_s"],
        "dropout0": plain,
        "dropout01": dropped,
        "threads": options.threads,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
