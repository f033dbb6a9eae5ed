"""Every method against a brute force of its own rule: outputs, keys read, and what each one promises."""

import math

import brute
import pytest
import torch

from nsa.eval.methods import METHODS, attention, split
from nsa.eval.methods.clusterkv import ClusterKV, kmeans
from nsa.eval.methods.exact_top import ExactTop
from nsa.eval.methods.full import Full
from nsa.eval.methods.h2o import H2O
from nsa.eval.methods.infllm import InfLLM
from nsa.eval.methods.magicpig import MagicPIG
from nsa.eval.methods.method import PHASES
from nsa.eval.methods.minference import MInference
from nsa.eval.methods.quest import Quest
from nsa.eval.methods.sequence import Reads, Sequence
from nsa.eval.methods.streaming_llm import StreamingLLM

PROMPT, LENGTH = 36, 45
MIXED = (("a_shape", "vertical_slash", "block_sparse", "vertical_slash"),) * 2  # layers
CASES = [
    Full(),
    ExactTop(sink=2, local=5, chosen=6),
    ExactTop(sink=0, local=1, chosen=0),
    StreamingLLM(sink=3, window=8),
    StreamingLLM(sink=0, window=60),
    H2O(sink=2, recent=5, heavy=6),
    H2O(sink=0, recent=1, heavy=4),
    InfLLM(init=2, local=6, block_size=4, num_blocks=2, representatives=2, chunk=5),
    InfLLM(init=0, local=1, block_size=3, num_blocks=3, representatives=1, chunk=64),
    Quest(page_size=4, num_pages=3, dense_layers=0),
    Quest(page_size=7, num_pages=2, dense_layers=1),
    MInference(num_vertical=5, num_slash=7, forced_vertical=2, forced_slash=3, last_queries=6, block_size=8,
               num_blocks=2, a_sink=3, a_local=6, patterns=MIXED),
    ClusterKV(sinks=3, budget=9, keys_per_cluster=6, iterations=5, recluster=4, dense_layers=0),
    ClusterKV(sinks=0, budget=4, keys_per_cluster=3, iterations=1, recluster=50, dense_layers=1),
    MagicPIG(sink=2, local=5, num_bits=2, num_tables=4, dense_every=2),
]  # fmt: skip


def names(case):
    return case.name


def inputs(h=4, g=2, length=LENGTH, d=8, dtype=torch.float64):
    """Random queries, keys that resemble them in part, values; and rotary frequencies."""
    shapes = ((h, length, d), (g, length, d), (g, length, d))
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    k[:, ::7] += 1.5 * q[:: h // g, ::7]
    return q.to(dtype), k.to(dtype), v.to(dtype), 10.0 ** -torch.arange(d // 2, dtype=torch.float64)


def run(method, q, k, v, inv_freq, prompt=PROMPT, layer=1, chunks=()):
    """Prefill (in chunks that end at `chunks`), then decode; outputs [h, T, e] and the sequence."""
    reads = {phase: Reads() for phase in PHASES}
    sequence = Sequence(layer, inv_freq, reads)
    parts, start = [], 0
    for end in [*chunks, *range(prompt, q.shape[1] + 1)]:
        sequence.phase = "prefill" if end <= prompt else "decode"
        sequence.scaling = q.shape[-1] ** -0.5
        sequence.reads[sequence.phase].queries += end - start
        sequence.append(k[:, start:end], v[:, start:end])
        step = method.prefill if end <= prompt else method.decode
        parts.append(step(q[:, start:end], sequence))
        start = end
    return torch.cat(parts, 1), sequence


@pytest.mark.parametrize("method", CASES, ids=names)
@pytest.mark.parametrize(("h", "g"), [(4, 2), (4, 1), (4, 4)])
def test_outputs_and_keys_read_are_those_of_the_rule(method, h, g):
    q, k, v, inv_freq = inputs(h, g)
    out, sequence = run(method, q, k, v, inv_freq)
    reads = getattr(brute, method.name)(method, q, k, v, PROMPT, inv_freq)
    torch.testing.assert_close(out, brute.outputs(reads, v, h, LENGTH), rtol=1e-10, atol=1e-10)
    for phase, positions in (("prefill", range(PROMPT)), ("decode", range(PROMPT, LENGTH))):
        expected = sum(len(keys) for (_, i), keys in reads.items() if i in positions) / h / len(positions)
        assert sequence.reads[phase].per_query()[0] == pytest.approx(expected)


@pytest.mark.parametrize("method", CASES, ids=names)
def test_small_chunks_of_queries_change_nothing(method, monkeypatch):
    q, k, v, inv_freq = inputs()
    whole, _ = run(method, q, k, v, inv_freq)
    monkeypatch.setitem(attention.CHUNK_ELEMENTS, "cpu", 4 * LENGTH * 3)
    chunked, _ = run(method, q, k, v, inv_freq)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)


# Not minference, whose estimate is that of the last queries of the call it sees, nor infllm with one chunk a prompt.
SPLIT = [case for case in CASES if case.name != "minference" and getattr(case, "chunk", 0) < PROMPT]


@pytest.mark.parametrize("method", SPLIT, ids=names)
def test_prefill_in_pieces_equals_prefill_at_once(method):
    q, k, v, inv_freq = inputs()
    whole, one = run(method, q, k, v, inv_freq)
    ends = (15, 30) if isinstance(method, InfLLM) else (1, 17, 33)  # infllm retrieves by chunks of queries
    pieces, two = run(method, q, k, v, inv_freq, chunks=ends)
    torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-10)
    assert float(one.reads["prefill"].attended) == float(two.reads["prefill"].attended)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.native])
@pytest.mark.parametrize("budget", [LENGTH, 2 * LENGTH])
def test_a_budget_that_covers_the_context_gives_dense_attention(name, budget):
    q, k, v, inv_freq = inputs()
    method = METHODS[name].at_budget(split(LENGTH, budget))
    for layer in (0, 1, 2):
        out, sequence = run(method, q, k, v, inv_freq, layer=layer)
        truth, dense = run(Full(), q, k, v, inv_freq, layer=layer)
        torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
        for phase in PHASES:
            assert float(sequence.reads[phase].attended) == float(dense.reads[phase].attended)


@pytest.mark.parametrize("name", ["exact_top", "streaming_llm", "h2o", "infllm", "clusterkv", "quest"])
def test_no_more_is_read_than_the_budget(name):
    q, k, v, inv_freq = inputs(length=200)
    method = METHODS[name].at_budget(split(200, 60))
    _, sequence = run(method, q, k, v, inv_freq, prompt=196, layer=5)
    attended, _ = sequence.reads["decode"].per_query()
    generated = 2.5 if name == "clusterkv" else 0  # its budget is of clustered keys; what is generated comes on top
    page = 4 if name == "quest" else 0  # 60 keys are 4 pages of 16
    assert 60 - 16 < attended <= 60 + generated + page


def test_h2o_never_brings_back_what_it_evicted():
    q, k, v, inv_freq = inputs(length=80)
    method, sequence = H2O(sink=2, recent=3, heavy=5), None
    reads = {phase: Reads() for phase in PHASES}
    sequence = Sequence(0, inv_freq, reads)
    sequence.scaling = 1.0
    sequence.append(k[:, :20], v[:, :20])
    method.prefill(q[:, :20], sequence)
    before = [set(range(20)) for _ in range(2)]
    for i in range(20, 80):
        sequence.append(k[:, i : i + 1], v[:, i : i + 1])
        method.decode(q[:, i : i + 1], sequence)
        for group in range(2):
            now = sequence.state.positions[group].tolist()
            assert set(now) <= before[group] | {i}
            assert set(now) >= {0, 1, i - 2, i - 1, i}
            assert len(now) == len(set(now)) == 10
            torch.testing.assert_close(sequence.k[group], k[group, now])
            before[group] = set(now)
    assert sequence.num_bytes() == 2 * 10 * (8 + 8 + 1 + 1) * 8  # memory is given back: keys, values, scores, positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quests_bound_is_an_upper_bound(dtype):
    q, k, v, inv_freq = inputs(length=100, dtype=dtype)
    method = Quest(page_size=8, num_pages=3, dense_layers=0)
    _, sequence = run(method, q, k, v, inv_freq, prompt=97)
    low, high = method._pages(sequence)
    bounds = method.bounds(q[:, -1:], low, high)[:, 0]
    for h in range(4):
        for j in range(100):
            score = float(q[h, -1].double() @ k[h // 2, j].double())
            largest = torch.maximum(low[h // 2, j // 8].abs(), high[h // 2, j // 8].abs()).double()
            rounding = 8 * torch.finfo(torch.float32).eps * float(q[h, -1].double().abs() @ largest)  # of a sum of 8
            assert float(bounds[h, j // 8]) >= score - rounding


def test_magicpigs_sums_are_unbiased():
    """The mean over independent projections of numerator and denominator lies within 4.5 standard errors of the truth.

    Each of the 3 x 2 x 9 sums is judged; by chance one would fall outside in 54 * 7e-6, less than one run in 2000.
    """
    draws, d = 400, 8
    q, k, v, _ = inputs(h=2, g=1, length=41, d=d)
    methods = [MagicPIG(sink=0, local=0, num_bits=3, num_tables=6, seed=seed) for seed in range(draws)]
    middle = k[0, :40] - k[0, :40].mean(0)
    logits = (q[:, -1] @ k[0, :40].T / math.sqrt(d)).double()
    truth = torch.cat([logits.exp()[..., None], logits.exp()[..., None] * v[0, :40]], -1).sum(1)  # [h, 1 + d]
    sums, read = [], 0.0
    for method in methods:
        tables = method.tables(k[:, :40], layer=1)
        torch.testing.assert_close(tables.directions[0], middle / middle.norm(dim=-1, keepdim=True))
        sampled, log_u = method.sample(q[:, -1:], tables, layer=1)
        weights = (logits - log_u).exp() * sampled
        sums.append(torch.cat([weights[..., None], weights[..., None] * v[0, :40]], -1).sum(1))
        read += float(sampled.double().mean()) / draws
    assert 0.05 < read < 0.95  # a sample, neither nothing nor all
    sums = torch.stack(sums)
    error = sums.std(0) / math.sqrt(draws)
    assert ((sums.mean(0) - truth).abs() < 4.5 * error).all()


def test_magicpigs_chance_is_that_of_two_tables():
    method = MagicPIG(num_bits=3, num_tables=5)
    for cosine in (-0.9, 0.0, 0.5, 0.99):
        p = (1 - math.acos(cosine) / math.pi) ** 3
        chance = sum(math.comb(5, hits) * p**hits * (1 - p) ** (5 - hits) for hits in range(2, 6))
        assert float(method.log_chance(torch.tensor(cosine, dtype=torch.float64))) == pytest.approx(math.log(chance))
    # Far away u is tiny; it must not round to zero.
    tiny = MagicPIG(num_bits=10, num_tables=150).log_chance(torch.tensor(-0.5))
    assert float(tiny) == pytest.approx(math.log(math.comb(150, 2) * (1 / 3) ** 20), rel=1e-3)


def test_clusters_part_what_points_elsewhere():
    directions = torch.eye(4, dtype=torch.float64)
    keys = (directions[torch.arange(20) % 4] * torch.arange(1, 21)[:, None] + 0.01 * torch.randn(20, 4))[None]
    labels, centroids, sizes = kmeans(keys, 4, 20)
    for first in range(4):
        assert len(set(labels[0, first::4].tolist())) == 1
        torch.testing.assert_close(centroids[0, labels[0, first]], keys[0, first::4].mean(0))
    assert sizes.tolist() == [[5, 5, 5, 5]]


def test_the_budget_is_divided_as_in_the_paper():
    assert (split(32_768).sink, split(32_768).local, split(32_768).chosen) == (128, 512, 1920)
    assert split(8192) == split(8192, 640) == split(8192, 640 / 8192)
    assert (split(8192).sink, split(8192).local, split(8192).chosen) == (32, 128, 480)
    assert split(100, 200) == split(100, 1.0) == split(100, 100)
    assert split(100, 100).local == 100
    with pytest.raises(ValueError, match=r"expected a budget of at least 3 keys .*, got 1"):
        split(10)


def test_the_highest_are_those_of_a_stable_sort():
    s = torch.randint(0, 5, (3, 20, 40)).double()
    s[..., ::3] = -torch.inf
    for count in (0, 1, 5, 13, 26, 27, 40, 60):
        best = s.argsort(dim=-1, descending=True, stable=True)[..., :count]
        expected = torch.zeros_like(s, dtype=torch.bool).scatter_(-1, best, True) & (s > -torch.inf)
        assert torch.equal(attention.top(s, count), expected)


def test_sizes_follow_the_budget():
    small, paper = split(8192, 40), split(32_768)
    assert METHODS["quest"].at_budget(small) == Quest(num_pages=3)  # its least
    assert METHODS["quest"].at_budget(paper) == Quest(num_pages=160)
    assert METHODS["h2o"].at_budget(paper) == H2O()
    assert METHODS["exact_top"].at_budget(paper) == ExactTop()
    assert METHODS["infllm"].at_budget(paper) == InfLLM()
    assert METHODS["infllm"].at_budget(small) == InfLLM(
        init=2, local=8, block_size=2, num_blocks=15, representatives=2, chunk=8
    )
    assert METHODS["clusterkv"].at_budget(paper) == ClusterKV()
    assert METHODS["streaming_llm"].at_budget(paper) == StreamingLLM(sink=128, window=2432)
    assert METHODS["magicpig"].at_budget(small) == MagicPIG(sink=2, local=8)
    minference = METHODS["minference"].at_budget(paper)
    assert minference.num_vertical + minference.num_slash == minference.a_sink + minference.a_local == 2560
    assert (minference.forced_vertical, minference.forced_slash, minference.num_blocks) == (128, 512, 40)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExactTop(local=0), "exact_top: expected local >= 1, got 0"),
        (lambda: H2O(heavy=-1), "h2o: expected heavy >= 0, got -1"),
        (lambda: MagicPIG(num_bits=16), "magicpig: expected num_bits <= 15 (codes are 16-bit), got 16"),
        (
            lambda: MInference(patterns=(("diagonal",),)),
            "minference: patterns are a_shape, vertical_slash, block_sparse; got diagonal",
        ),
    ],
)
def test_impossible_sizes_are_one_clear_line(make, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        make()
    assert str(caught.value) == message
