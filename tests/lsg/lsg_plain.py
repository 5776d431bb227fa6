"""LSG attention written with explicit loops over tokens: slow, and near to the words of the paper."""

import math

import torch


def plain_lsg(q, k, v, valid, spec, layer=0):
    """The same as `spec(q, k, v, valid, layer)`, for right-padded batches; one example, head, query and key at a time."""
    output = torch.zeros_like(q)
    for example in range(q.shape[0]):
        length = int(valid[example].sum())
        for head in range(q.shape[1]):
            rows = _one_head(*(x[example, head, :length] for x in (q, k, v)), spec, layer, head, q.shape[1])
            output[example, head, :length] = rows
    return output


def _one_head(q, k, v, spec, layer, head, heads):
    length, front, block = len(q), spec.num_global_tokens, spec.block_size
    hidden = {front} if spec.mask_first_token else set()
    sparse = [] if length - front <= 2 * block else sparse_list(q, k, v, spec, layer, head, heads, hidden)
    output = torch.zeros_like(q)
    for i in range(length):
        pairs = []  # keys in view: (key, value)
        for j in range(length):
            if j in hidden or (spec.causal and j > i):
                continue
            dense = length - front <= 2 * block or (i < front and not spec.causal) or j < front
            near = i >= front and j >= front and abs((i - front) // block - (j - front) // block) <= 1
            if dense or near:
                pairs.append((k[j], v[j]))
        if i >= front:
            at, per_block, width = (i - front) // block, spec.sparse_per_block, spec.sparse_block_size
            for s, pair in enumerate(sparse):
                left = (at - 1) * per_block - width <= s < (at - 1) * per_block
                right = (at + 2) * per_block <= s < (at + 2) * per_block + width
                if pair is not None and (left or (right and not spec.causal)):
                    pairs.append(pair)
        if pairs:
            scores = torch.stack([q[i] @ key / math.sqrt(len(key)) for key, _ in pairs])
            probabilities = spec.normalizer(scores[None])[0]
            output[i] = sum(p * value for p, (_, value) in zip(probabilities, pairs, strict=True))
    return output


def sparse_list(q, k, v, spec, layer, head, heads, hidden):
    """The sparse keys of one head in order, as (key, value) or None where there is no real token."""
    if not spec.has_sparse:
        return []
    front, block, factor = spec.num_global_tokens, spec.block_size, spec.sparsity_factor
    text = -(-(len(q) - front) // block) * block
    present = [front + t < len(q) and front + t not in hidden for t in range(text)]

    def token(t):
        return (k[front + t], v[front + t]) if present[t] else None

    if factor == 1:
        return [token(t) for t in range(text)]
    result = []
    if spec.sparsity_type == "norm":
        chunk = min(block, spec.sparse_block_size)
        for start in range(0, text, chunk):
            by_norm = sorted(
                range(start, start + chunk), key=lambda t: float(k[front + t].norm()) if present[t] else -1.0
            )
            result += [token(t) for t in by_norm[-(chunk // factor) :]]
    elif spec.sparsity_type == "stride":
        result = [token(t) for t in range(text) if t % factor == head % factor]
    elif spec.sparsity_type == "block_stride":
        run = block // factor
        result = [token(t) for t in range(text) if (t % block) // run == head % factor]
    elif spec.sparsity_type == "pooling":
        for start in range(0, text, factor):
            members = [token(t) for t in range(start, start + factor) if present[t]]
            result.append(_weighted(members, [1 / len(members)] * len(members)) if members else None)
    elif spec.sparsity_type == "bos_pooling" or min(block, spec.sparse_block_size) == factor:
        for start in range(0, text, factor):
            members = [token(t) for t in range(start, start + factor) if present[t]]
            weights = [math.exp(float(q[front] @ key) / math.sqrt(len(key))) for key, _ in members]
            result.append(_weighted(members, [w / sum(weights) for w in weights]) if members else None)
    else:
        result = _clusters(token, text, k.shape[1], spec, layer, head, heads)
    return result


def _weighted(members, weights):
    return tuple(sum(w * pair[part] for w, pair in zip(weights, members, strict=True)) for part in (0, 1))


def _clusters(token, text, size, spec, layer, head, heads):
    chunk = min(spec.block_size, spec.sparse_block_size)
    generator = torch.Generator().manual_seed(spec.seed * 1_000_003 + layer)
    counts = [chunk] * spec.lsh_num_pre_rounds + [chunk // spec.sparsity_factor]
    planes = [torch.randn(heads, size, max(c // 2, 1), generator=generator)[head] for c in counts]
    result = []
    for start in range(0, text, chunk):
        # each cluster: (sum of keys, sum of values, number of tokens)
        clusters = [(*pair, 1) for pair in (token(t) for t in range(start, start + chunk)) if pair is not None]
        for plane, count in zip(planes, counts, strict=True):
            merged = [None] * count
            for key, value, tokens in clusters:
                sides = torch.nn.functional.normalize(key, dim=0) @ plane
                bucket = int(torch.cat([sides, -sides]).argmax())
                old = merged[bucket]
                merged[bucket] = (
                    (key, value, tokens) if old is None else (old[0] + key, old[1] + value, old[2] + tokens)
                )
            clusters = [cluster for cluster in merged if cluster is not None]
        result += [None if c is None else (c[0] / c[2], c[1] / c[2]) for c in merged]
    return result
