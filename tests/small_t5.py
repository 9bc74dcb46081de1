"""Small T5 models, stock and ours, and batches for them, padded and packed."""

import torch
import transformers
from transformers import T5Config

V10 = {"feed_forward_proj": "relu"}
V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SIZES = (
    {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4},
    {"d_model": 48, "d_kv": 8, "d_ff": 96, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2},  # inner width 16, not 48
)
CASES = [(version, size) for version in (V10, V11) for size in SIZES]


def config_of(version: dict, size: dict, **more) -> T5Config:
    return T5Config(vocab_size=120, dropout_rate=0.0, decoder_start_token_id=0, num_labels=3, **size, **version, **more)


def stock_checkpoint(folder, version: dict, size: dict):
    """A stock model with weights that make attention and bias matter, saved; v1.1 gets a head of its own."""
    torch.manual_seed(0)
    stock = transformers.T5ForConditionalGeneration(config_of(version, size)).eval()
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            parameter.mul_(4 if "relative" in name else 1)
    if version is V11:
        stock.lm_head.weight = torch.nn.Parameter(torch.randn_like(stock.lm_head.weight))
        stock.all_tied_weights_keys.pop("lm_head.weight", None)
    stock.save_pretrained(folder)
    return stock


def padded_batch(rows: int = 5, source: int = 17, target: int = 9):
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(2, 120, (rows, source), generator=generator)
    labels = torch.randint(2, 120, (rows, target), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(rows):
        attention_mask[row, source - 3 * row :] = 0 if row else 1
        labels[row, target - row :] = -100 if row else labels[row, target - row :]
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask, "labels": labels}


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((ours - expected).norm() / expected.norm().clamp(min=1e-12)).detach())


def packed_row():
    """Three examples, their packed row, and its padding at the end of both sides."""
    generator = torch.Generator().manual_seed(2)
    sources = [torch.randint(2, 120, (1, n), generator=generator) for n in (5, 9, 3)]
    targets = [torch.randint(2, 120, (1, n), generator=generator) for n in (4, 2, 6)]
    row = {
        "input_ids": torch.cat([*sources, torch.zeros(1, 3, dtype=torch.long)], dim=1),
        "labels": torch.cat([*targets, torch.full((1, 2), -100)], dim=1),
        "encoder_segment_ids": torch.tensor([[1] * 5 + [2] * 9 + [3] * 3 + [0] * 3]),
        "decoder_segment_ids": torch.tensor([[1] * 4 + [2] * 2 + [3] * 6 + [0] * 2]),
    }
    return sources, targets, row
