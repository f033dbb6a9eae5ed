"""What scores keep of a dense model's attention is what loops over its own probabilities say."""

import importlib
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nsa.config import NSAConfig
from nsa.eval.tasks import Perplexity
from nsa.testing.brute_force_selection import compression_blocks, forced_blocks, importance_by_overlap, select
from nsa.training.tokenizer import byte_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
bench = importlib.import_module("block_scores")

LENGTH, LAYER, SAMPLES = 96, 1, 2
SIZES = {"select_block_size": 8, "num_selected_blocks": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("dense"), byte_tokenizer()
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 32}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, initializer_range=0.3, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("".join(f"line {i * i} of the text\n" for i in range(200)))
    return folder


def asked(folder, **more):
    given = {"layers": [LAYER], "select": ["8/5"], "compress": ["8/4", "4/4"], "fit": [], "steps": 0, "length": LENGTH}
    given |= {"samples": SAMPLES, "fit_samples": 1, "device": "cpu", "dtype": "float64"}
    return Namespace(model=folder, text=folder / "text", **given | more)


class Dense:
    """One sequence by transformers' own eager attention: its probabilities, queries and keys."""

    def __init__(self, model, row):
        out = model(row[None], output_attentions=True, output_hidden_states=True)
        self.p, layer = out.attentions[LAYER][0], model.model.layers[LAYER]
        x = layer.input_layernorm(out.hidden_states[LAYER])
        maps = (layer.self_attn.q_proj, layer.self_attn.k_proj)
        q, self.k_raw = (each(x).view(1, LENGTH, -1, 8).transpose(1, 2) for each in maps)
        self.turns = model.model.rotary_emb(x, torch.arange(LENGTH)[None])
        self.q, self.k = (each[0] for each in apply_rotary_pos_emb(q, self.k_raw, *self.turns))

    def compressed(self, group, block):
        """The rotated mean of a block, and its rotated keys' variance."""
        turns = (each[:, block[:1]] for each in self.turns)
        mean = self.k_raw[:, group : group + 1, block].mean(2, keepdim=True)
        return apply_rotary_pos_emb(mean, mean, *turns)[0].flatten(), self.k[group, block].var(0, correction=0)

    def shares(self, config, second):
        """Of the attention to free blocks: what the chosen ones keep, and the best."""
        whole = kept = best = 0.0
        positions = torch.linspace(LENGTH // 2, LENGTH - 1, bench.QUERIES).long()  # some of them several times
        for group in (0, 1):
            blocks = [list(block) for block in compression_blocks(LENGTH, config)]
            keys = [self.compressed(group, block) for block in blocks]
            for position, times in Counter(positions.tolist()).items():
                scores = mass = torch.zeros(LENGTH // 8, dtype=torch.float64)
                for head in (2 * group, 2 * group + 1):
                    q = self.q[head, position] * 8**-0.5
                    seen = [each for each, block in zip(keys, blocks, strict=True) if block[-1] <= position]
                    logits = torch.stack([q @ mean + second * (q * q) @ var / 2 for mean, var in seen])
                    scores = scores + torch.tensor(importance_by_overlap(logits.softmax(0).tolist(), len(mass), config))
                    mass = mass + self.p[head, position].view(-1, 8).sum(-1)
                free = sorted({*range(position // 8 + 1)} - forced_blocks(position, config))
                chosen = {*select(scores.tolist(), position, config)} & {*free}
                whole += times * mass[free].sum().item()
                kept += times * sum(mass[j].item() for j in chosen)
                best += times * mass[free].topk(config.num_selected_blocks - 3).values.sum().item()
        return kept / whole, best / whole


@torch.no_grad()
def test_mean_variance_and_best_are_those_of_loops_over_the_dense_models_probabilities(folder, capsys):
    found = bench.compare(asked(folder))["8/5"]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()
    rows = Perplexity(length=LENGTH, samples=SAMPLES + 1, text=str(folder / "text")).sequences(byte_tokenizer())[1:]
    dense = [Dense(model, row) for row in rows]
    for blocks, (size, stride) in {"8/4": (8, 4), "4/4": (4, 4)}.items():
        config = NSAConfig(compress_block_size=size, compress_stride=stride, **SIZES)
        for name, second in ((f"mean, {blocks}", 0), (f"mean + var, {blocks}", 1)):
            shares = torch.tensor([each.shares(config, second) for each in dense], dtype=torch.float64).mean(0)
            torch.testing.assert_close(
                torch.tensor([found[name]["layers"][0], found["best"]["layers"][0]]).double(), shares
            )
            assert found[name]["vectors"] == len(compression_blocks(LENGTH, config)) * (1 + second)
    assert found["mean, 8/4"] != found["mean + var, 8/4"]
    assert "| mean + var, 4/4 | 48 | 0." in capsys.readouterr().out


def test_a_fitted_score_starts_as_the_mean_and_its_divergence_falls(folder):
    found = bench.compare(asked(folder, fit=["8/4", "8/4+var"]))["8/5"]
    for name in (", 8/4", " + var, 8/4"):
        assert found[f"mlp{name}"]["layers"] == pytest.approx(found[f"mean{name}"]["layers"], rel=1e-10)

    candidate = bench.load(folder, name="dense", device="cpu", dtype="float64")
    sparse = bench.swap_attention(candidate.model, nsa={"compression": "mean", "shared_kv": True})
    rows = Perplexity(length=LENGTH, samples=2, text=str(folder / "text")).sequences(candidate.tokenizer)
    inputs = bench.inputs_of(candidate.model, [LAYER], rows)[LAYER]
    sequences = [bench.Heads.of(sparse.model.layers[LAYER].self_attn, x) for x in inputs]
    score = bench.Score("mlp", "8/4+var", "8/5", inputs[0].new_empty(8))

    def divergence():
        torch.manual_seed(1)
        losses = (bench.selector_loss(*score(heads), heads.layout, score.config) for heads in sequences)
        return sum(loss.item() for loss in losses)

    before = divergence()
    score.fit(sequences, 20)
    assert divergence() < before
    assert score.c.item() != 1


def test_what_leaves_nothing_to_choose_is_refused(folder):
    with pytest.raises(ValueError, match="--select: expected n above the 3 blocks that are forced, got 3"):
        bench.compare(asked(folder, select=["8/3"]))
    with pytest.raises(ValueError, match="--length: expected more than the 24 tokens of forced blocks, got 24"):
        bench.compare(asked(folder, length=24))
    with pytest.raises(ValueError, match="expected two numbers as in 16/8, got '8x4'"):
        bench.compare(asked(folder, compress=["8x4"]))
    with pytest.raises(ValueError, match="--samples, --fit-samples: expected 1 or more, got 0 and 1"):
        bench.compare(asked(folder, samples=0))
