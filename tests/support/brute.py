"""Each method's own rule in a few lines of loops, in float64, sharing no code with the methods.

A rule is called as rule(method, q, k, v, prompt, inv_freq), with q [h, T, d], k and v [g, T, d] of a whole sequence
whose first `prompt` tokens are the prompt, and returns for every query (head, position) the keys that it reads with
their logits: {(h, i): {j: logit}}.
"""

import cmath
import math
from collections import defaultdict

import torch


def outputs(reads, v, h, length):
    """Softmax attention over what was read, [h, T, e]."""
    out = torch.zeros(h, length, v.shape[-1], dtype=torch.float64)
    for (head, i), logits in reads.items():
        for j, p in softmax(logits).items():
            out[head, i] += p * v[head * len(v) // h, j]
    return out


def softmax(logits):
    highest = max(logits.values())
    weights = {j: math.exp(x - highest) for j, x in logits.items()}
    total = sum(weights.values())
    return {j: w / total for j, w in weights.items()}


def dot(q, k, head, i, j):
    return float(q[head, i] @ k[head * len(k) // len(q), j]) / math.sqrt(q.shape[-1])


def shifted(x, by, inv_freq):
    """A vector as if its rotary position were larger: complex pairs (c, c + d/2) turned by their angles."""
    half = len(x) // 2
    pairs = [complex(x[c], x[c + half]) * cmath.exp(1j * by * float(inv_freq[c])) for c in range(half)]
    return torch.tensor([z.real for z in pairs] + [z.imag for z in pairs], dtype=torch.float64)


def highest(candidates, count, score):
    return sorted(candidates, key=lambda j: (-score(j), j))[:count]


def dense(q, k, head, i):
    return {j: dot(q, k, head, i, j) for j in range(i + 1)}


def full(method, q, k, v, prompt, inv_freq):
    return {(h, i): dense(q, k, h, i) for h in range(len(q)) for i in range(q.shape[1])}


def exact_top(method, q, k, v, prompt, inv_freq):
    reads = {}
    for (h, i), logits in full(method, q, k, v, prompt, inv_freq).items():
        forced = {j for j in logits if j < method.sink or j > i - method.local}
        chosen = highest(logits.keys() - forced, method.chosen, lambda j, logits=logits: logits[j])
        reads[h, i] = {j: logits[j] for j in (*forced, *chosen)}
    return reads


def streaming_llm(method, q, k, v, prompt, inv_freq):
    reads = {}
    for (h, i), logits in full(method, q, k, v, prompt, inv_freq).items():
        reads[h, i] = {j: x for j, x in logits.items() if j > i - method.window}
        place = min(i, method.sink + method.window - 1)
        for j in range(min(method.sink, i - method.window + 1)):
            turned = shifted(q[h, i], place - i, inv_freq)
            reads[h, i][j] = float(turned @ k[h * len(k) // len(q), j]) / math.sqrt(q.shape[-1])
    return reads


def h2o(method, q, k, v, prompt, inv_freq):
    reads, (g, length, _) = {}, k.shape
    gathered = [defaultdict(float) for _ in range(g)]
    kept = [[] for _ in range(g)]
    for i in range(length):
        for group in range(g):
            kept[group].append(i)
            if i >= prompt:
                old = kept[group][method.sink : -method.recent]
                heavy = highest(old, method.heavy, lambda j, group=group: gathered[group][j])
                kept[group] = [j for j in kept[group] if j not in old or j in heavy]
        for h in range(len(q)):
            group = h * g // len(q)
            reads[h, i] = {j: dot(q, k, h, i, j) for j in kept[group]}
            for j, p in softmax(reads[h, i]).items():
                gathered[group][j] += p
    return reads


def quest(method, q, k, v, prompt, inv_freq):
    reads = full(method, q, k, v, prompt, inv_freq)
    for h in range(len(q)):
        for i in range(prompt, q.shape[1]):
            own = k[h * len(k) // len(q), : i + 1]
            bounds = [
                sum(max(float(x * page[:, c].min()), float(x * page[:, c].max())) for c, x in enumerate(q[h, i]))
                for page in own.split(method.page_size)
            ]
            pages = highest(range(len(bounds)), method.num_pages, lambda p, bounds=bounds: bounds[p])
            reads[h, i] = {j: x for j, x in reads[h, i].items() if j // method.page_size in pages}
    return reads


def infllm(method, q, k, v, prompt, inv_freq):
    (h, length, d), g = q.shape, len(k)
    reads, received, representatives = {}, [defaultdict(float) for _ in range(g)], {}
    starts = [*range(0, prompt, method.chunk), *range(prompt, length)]
    for start, end in zip(starts, [*starts[1:], length], strict=True):
        block, blocks = 0, []
        while method.init + (block + 1) * method.block_size <= start - method.local + 1:
            tokens = range(method.init + block * method.block_size, method.init + (block + 1) * method.block_size)
            for group in range(g):
                if (group, block) not in representatives:
                    best = highest(tokens, method.representatives, lambda j, group=group: received[group][j])
                    keys = [shifted(k[group, j], -j, inv_freq) for j in best]
                    representatives[group, block] = sum(keys) / len(keys)
            blocks.append(tokens)
            block += 1
        far_q = {
            (head, i): shifted(q[head, i], method.local - i, inv_freq) for head in range(h) for i in range(start, end)
        }
        relevance = [
            sum(float(x @ representatives[head * g // h, b]) for (head, _), x in far_q.items())
            for b in range(len(blocks))
        ]
        chosen = highest(range(len(blocks)), method.num_blocks, relevance.__getitem__)
        far = {*range(method.init), *(j for b in chosen for j in blocks[b])}
        for (head, i), x in far_q.items():
            window = range(max(0, i - method.local + 1), i + 1)
            logits = {j: dot(q, k, head, i, j) for j in window}
            for j in far:
                if j <= i - method.local:
                    logits[j] = float(x @ shifted(k[head * g // h, j], -j, inv_freq)) / math.sqrt(d)
            reads[head, i] = logits
            for j, p in softmax(logits).items():
                received[head * g // h][j] += p if j in window else 0.0
    return reads


def minference(method, q, k, v, prompt, inv_freq):
    reads = full(method, q, k, v, prompt, inv_freq)
    size = method.block_size
    for h in range(len(q)):
        pattern, group = method.patterns[0][h], h * len(k) // len(q)
        columns, diagonals = defaultdict(float), defaultdict(float)
        for i in range(max(0, prompt - method.last_queries), prompt):
            for j, p in softmax(reads[h, i]).items():
                columns[j] += p
                diagonals[i - j] += p
        columns.update({j: math.inf for j in range(method.forced_vertical)})
        diagonals.update({o: math.inf for o in range(method.forced_slash)})
        vertical = highest(range(prompt), method.num_vertical, lambda j, columns=columns: columns[j])
        slash = highest(range(prompt), method.num_slash, lambda o, diagonals=diagonals: diagonals[o])
        q_mean, k_mean = ([part.mean(0) for part in x[:prompt].split(size)] for x in (q[h], k[group]))
        for i in range(prompt):
            scores = [float(q_mean[i // size] @ k_mean[b]) for b in range(i // size + 1)]
            blocks = highest(range(len(scores)), method.num_blocks, lambda b, scores=scores: scores[b])
            read = {
                "a_shape": lambda j, i=i: j < method.a_sink or j > i - method.a_local,
                "vertical_slash": lambda j, i=i, vertical=vertical, slash=slash: j in vertical or i - j in slash,
                "block_sparse": lambda j, blocks=blocks: j // size in blocks,
            }[pattern]
            reads[h, i] = {j: x for j, x in reads[h, i].items() if read(j)}
    return reads


def clusterkv(method, q, k, v, prompt, inv_freq):
    reads = full(method, q, k, v, prompt, inv_freq)
    for h in range(len(q)):
        own, clusters, end = k[h * len(k) // len(q)], [], method.sinks
        for i in range(prompt, q.shape[1]):
            if not clusters or i - end >= method.recluster:
                clusters += kmeans(own, range(end, i), method)
                end = i
            kept, left = {*range(method.sinks), *range(end, i + 1)}, method.budget
            means = [sum(own[j] for j in cluster) / len(cluster) for cluster in clusters]
            relevance = [float(q[h, i] @ mean) for mean in means]
            for c in highest(range(len(clusters)), len(clusters), relevance.__getitem__):
                kept |= set(sorted(clusters[c])[:left])
                left = max(0, left - len(clusters[c]))
            reads[h, i] = {j: x for j, x in reads[h, i].items() if j in kept}
    return reads


def kmeans(keys, tokens, method):
    """Lists of tokens; empty clusters left out."""
    count = max(1, round(len(tokens) / method.keys_per_cluster))
    places = [round(c * (len(tokens) - 1) / max(1, count - 1)) for c in range(count)]
    centers = [keys[tokens[p]] / keys[tokens[p]].norm() for p in places]
    for _ in range(method.iterations):
        clusters = [[] for _ in range(count)]
        for j in tokens:
            cosines = [float(keys[j] @ c / keys[j].norm()) for c in centers]
            clusters[cosines.index(max(cosines))].append(j)
        sums = [sum((keys[j] / keys[j].norm() for j in cluster), torch.zeros(keys.shape[1])) for cluster in clusters]
        centers = [s / s.norm() if len(c) else old for s, c, old in zip(sums, clusters, centers, strict=True)]
    return [cluster for cluster in clusters if cluster]


def magicpig(method, q, k, v, prompt, inv_freq):
    reads = full(method, q, k, v, prompt, inv_freq)
    bits, tables, d = method.num_bits, method.num_tables, q.shape[-1]
    generator = torch.Generator().manual_seed(method.seed * 1009 + 1)  # of layer 1
    planes = torch.randn(d, tables * bits, generator=generator, dtype=torch.float64)
    for h in range(len(q)):
        own, middle = k[h * len(k) // len(q)], range(method.sink, prompt - method.local)
        mean = sum(own[j] for j in middle) / len(middle)
        for i in range(prompt, q.shape[1]):
            for j in middle:
                same = ((q[h, i] @ planes > 0) == ((own[j] - mean) @ planes > 0)).reshape(tables, bits).all(1).sum()
                if same < 2:
                    del reads[h, i][j]
                    continue
                p = 1 - math.acos(float(torch.cosine_similarity(q[h, i], own[j] - mean, dim=0))) / math.pi
                u = 1 - (1 - p**bits) ** tables - tables * p**bits * (1 - p**bits) ** (tables - 1)
                reads[h, i][j] -= math.log(u)
    return reads
