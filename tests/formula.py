"""The formulas, one number at a time: what every backend is compared with."""

from math import exp, sqrt

import numpy as np
import torch

from .layers import HEADS, KV_HEADS, SCALE, VALUE_DIM


def documents_and_positions(segments):
    """One row of segments -> (document, position) of each token, None for padding."""
    out, previous, document, position = [], None, -1, 0
    for segment in segments:
        if segment == 0:
            out.append(None)
            continue
        if segment != previous:
            previous, document, position = segment, document + 1, 0
        out.append((document, position))
        position += 1
    return out


def is_near(config, i, j):
    size = config.window_size
    near = {
        None: lambda: False,
        "sliding": lambda: i - j < size,
        "block": lambda: i // size == j // size,
        "terrace": lambda: j // size >= i // size - 1,
    }[config.window]()
    return near or j < config.sinks


def naive(layer, x):
    """[B, H, T, D_v] by loops over rows, heads, queries and keys."""
    config, weights = layer.config, layer.weights(torch.device("cpu"))
    has_far = config.feature_map is not None
    q, sink_q = x.q.numpy(), x.sink_q.numpy()
    k, v, raw_k = x.k, x.v, x.raw_k
    if config.key_maps == "query_head":
        k, v, raw_k = (y.repeat_interleave(HEADS // KV_HEADS, dim=1) for y in (k, v, raw_k))
    k, v = k.numpy(), v.numpy()
    kv_heads = k.shape[1]
    batch, length = x.shape
    if has_far:
        phi_q, phi_k = layer.phi_q(x.raw_q).numpy(), layer.phi_k(raw_k).numpy()
        fade, beta = np.ones((batch, kv_heads, length)), None
        if config.state != "additive":
            gates = layer.gates(raw_k)
            fade = gates.log_decay.exp().numpy()
        if config.state == "delta":
            beta = gates.beta.numpy()
            phi_q, phi_k = (phi / np.linalg.norm(phi, axis=-1, keepdims=True) for phi in (phi_q, phi_k))
    segments = np.ones((batch, length), int) if x.segments is None else x.segments.numpy()
    out = np.zeros((batch, HEADS, length, VALUE_DIM))
    for row in range(batch):
        place = documents_and_positions(segments[row])
        for head in range(HEADS):
            kv_head = head // (HEADS // kv_heads)
            g, lam = weights.near[head].item(), weights.far[head].item()
            left = {}  # what each key leaves in the state
            for i in range(length):
                if place[i] is None:
                    continue
                before = [j for j in range(i + 1) if place[j] is not None and place[j][0] == place[i][0]]

                fading = {j: fade[row, kv_head, j] for j in before if place[j][1] >= config.sinks} if has_far else {}

                def faded(j, fading=fading):
                    return np.prod([factor for later, factor in fading.items() if later > j])

                near, far, convolved = [], [], np.zeros(VALUE_DIM)
                for j in before:
                    distance = place[i][1] - place[j][1]
                    (near if is_near(config, place[i][1], place[j][1]) else far).append(j)
                    if distance < config.conv_taps:
                        convolved += weights.conv[head, distance].item() * v[row, kv_head, j]
                scores = {}
                for j in near:
                    as_sink = config.sink_distance is not None and place[j][1] < config.sinks
                    query, key = (sink_q if as_sink else q)[row, head, i], k[row, kv_head, j]
                    if config.local == "relu2":
                        scores[j] = query @ key / np.linalg.norm(query) / np.linalg.norm(key)
                    else:
                        scores[j] = SCALE * query @ key
                m = max(scores.values(), default=0.0)
                if config.local == "relu2":
                    a, local_mass = {j: max(score, 0) ** 2 for j, score in scores.items()}, 1
                else:
                    a = {j: exp(score - m) for j, score in scores.items()}
                    local_mass = sum(a.values())
                local = sum(w * v[row, kv_head, j] for j, w in a.items())
                remembered, mass = np.zeros(VALUE_DIM), 0.0
                if has_far:
                    left[i] = np.append(v[row, kv_head, i], 1.0)
                    if beta is not None:
                        read = sum(
                            (phi_k[row, kv_head, i] @ phi_k[row, kv_head, j]) * faded(j) * left[j]
                            for j in before
                            if j != i and place[j][1] >= config.sinks
                        )
                        left[i] = beta[row, kv_head, i] * (left[i] - read)
                    b = {j: (phi_q[row, head, i] @ phi_k[row, kv_head, j]) * faded(j) for j in far}
                    total = sum((w * left[j] for j, w in b.items()), np.zeros(VALUE_DIM + 1))
                    remembered, mass = total[:-1], total[-1]
                if config.combine == "shared":
                    # g and lam b are relative to exp(-m): the maximum is taken out of the near weights.
                    mass = max(mass, 0) if config.state == "delta" else mass
                    attended = (g * local + lam * remembered) / ((g * local_mass + lam * mass) or 1)
                else:
                    norm = {
                        "sum": mass or 1,
                        "count": max(len(far), 1),
                        "rms": sqrt(np.mean(remembered**2) + 1e-6),
                        "none": 1,
                    }[config.norm]
                    attended = g * local / (local_mass or 1) + lam * remembered / norm
                out[row, head, i] = attended + convolved
    return torch.from_numpy(out)
