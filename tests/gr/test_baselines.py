"""SASRec, Transformer++ and cross-attention against fp64 loops over one sequence at a time."""

import math

import pytest
import torch

from gr.baselines.cross_attention import CrossAttentionEncoder
from gr.baselines.sasrec import SASRecEncoder
from gr.baselines.transformer import TransformerEncoder
from gr.config import ModelConfig, TransformerConfig
from tests.gr.hstu_oracle import make_info, make_sequences, normalize, sees

DIM, HEADS = 8, 2
ENCODERS = {
    "sasrec": SASRecEncoder,
    "transformer": TransformerEncoder,
    "cross_attention": CrossAttentionEncoder,
}
# lengths, tails, candidates, context tokens. Tails reach into context, history and candidates.
STRUCTURES = {
    "plain": ([4, 1, 0, 3, 2], [2, 1, 0, 3, 0], None, 0),
    "context": ([5, 2, 3], [5, 0, 1], None, 2),
    "candidates": ([4, 5, 1], [2, 3, 1], [2, 3, 1], 0),
    "context_and_candidates": ([6, 3, 5], [3, 3, 0], [3, 1, 0], 2),
}


def make_encoder(name, num_layers=2, ffn_dim=5, dropout=0.0):
    torch.manual_seed(0)
    config = ModelConfig(
        encoder=name,
        dim=DIM,
        num_layers=num_layers,
        transformer=TransformerConfig(num_heads=HEADS, ffn_dim=ffn_dim, dropout=dropout),
    )
    encoder = ENCODERS[name](config).double()
    # Large weights, so that no term hides.
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return encoder


def make_batch(structure, seed=0):
    lengths, tails, candidates, num_context = STRUCTURES[structure]
    sequences = make_sequences(lengths, tails, candidates, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(sum(lengths), DIM, dtype=torch.float64, generator=generator)
    return sequences, num_context, x


def attend(queries, keys, values, sequence, num_context):
    """Softmax attention of every row, head by head, key by key."""
    width = DIM // HEADS
    rows = []
    for i in range(sequence.length):
        heads = []
        for h in range(HEADS):
            part = slice(h * width, (h + 1) * width)
            total, weighted = torch.zeros((), dtype=torch.float64), 0.0
            for j in range(sequence.length):
                if sees(i, j, sequence, num_context):
                    score = (queries[i][part] * keys[j][part]).sum() / math.sqrt(width)
                    total = total + score.exp()
                    weighted = weighted + score.exp() * values[j][part]
            heads.append(weighted / total)
        rows.append(torch.cat(heads))
    return rows


def linear(p, name, x):
    y = p[f"{name}.weight"] @ x
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def sasrec_layer(p, rows, sequence, num_context):
    normed = [normalize(x, eps=1e-8) for x in rows]
    queries = [linear(p, "query", x) for x in normed]
    keys_values = [linear(p, "key_value", x) for x in rows]
    keys, values = [x[:DIM] for x in keys_values], [x[DIM:] for x in keys_values]
    attended = attend(queries, keys, values, sequence, num_context)
    result = []
    for x, a in zip(normed, attended, strict=True):
        z = normalize(x + linear(p, "output", a), eps=1e-8)
        hidden = linear(p, "ffn_in", z)
        result.append(z + linear(p, "ffn_out", torch.where(hidden > 0, hidden, 0.0)))
    return result


def rms_normalize(x, weight):
    return x / ((x * x).sum() / len(x) + 1e-6).sqrt() * weight


def turn(x, position):
    """Multiply the complex numbers x[i] + j x[i + K / 2] of each head by exp(j angle)."""
    width = DIM // HEADS
    heads = []
    for h in range(HEADS):
        head = x[h * width : (h + 1) * width]
        pairs = torch.complex(head[: width // 2], head[width // 2 :])
        angles = [position / 10_000 ** (2 * i / width) for i in range(width // 2)]
        turned = pairs * torch.exp(1j * torch.tensor(angles, dtype=torch.float64))
        heads += [turned.real, turned.imag]
    return torch.cat(heads)


def cross_attention_layer(p, rows, tokens, sequence, num_context):
    queries = [linear(p, "query", rms_normalize(x, p["attention_norm.weight"])) for x in rows]
    keys_values = [linear(p, "key_value", x) for x in tokens]
    keys, values = [x[:DIM] for x in keys_values], [x[DIM:] for x in keys_values]
    return swiglu(p, rows, attend(queries, keys, values, sequence, num_context))


def transformer_layer(p, rows, sequence, num_context):
    history = sequence.length - sequence.num_candidates
    positions = [min(i, history) for i in range(sequence.length)]
    normed = [rms_normalize(x, p["attention_norm.weight"]) for x in rows]
    queries = [turn(linear(p, "query", x), t) for x, t in zip(normed, positions, strict=True)]
    keys_values = [linear(p, "key_value", x) for x in normed]
    keys = [turn(x[:DIM], t) for x, t in zip(keys_values, positions, strict=True)]
    attended = attend(queries, keys, [x[DIM:] for x in keys_values], sequence, num_context)
    return swiglu(p, rows, attended)


def swiglu(p, rows, attended):
    result = []
    for x, a in zip(rows, attended, strict=True):
        z = x + linear(p, "output", a)
        both = linear(p, "ffn_in", rms_normalize(z, p["ffn_norm.weight"]))
        gate, value = both[: len(both) // 2], both[len(both) // 2 :]
        result.append(z + linear(p, "ffn_out", gate / (1 + torch.exp(-gate)) * value))
    return result


def oracle(name, parameters, num_layers, sequences, num_context, x):
    """The rows of the tails of all sequences."""
    layer = sasrec_layer if name == "sasrec" else transformer_layer
    result, start = [], 0
    for sequence in sequences:
        rows = list(x[start : start + sequence.length])
        if name == "cross_attention":
            tokens = [rms_normalize(row, parameters["token_norm.weight"]) for row in rows]
        start += sequence.length
        for n in range(num_layers):
            prefix = f"layers.{n}."
            p = {k.removeprefix(prefix): v for k, v in parameters.items() if k.startswith(prefix)}
            if name == "cross_attention":
                rows = cross_attention_layer(p, rows, tokens, sequence, num_context)
            else:
                rows = layer(p, rows, sequence, num_context)
        for row in rows[sequence.length - sequence.tail :]:
            if name == "sasrec":
                result.append(normalize(row, eps=1e-8))
            else:
                result.append(rms_normalize(row, parameters["final_norm.weight"]))
    return torch.stack(result)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_equals_the_equations_in_value_and_gradients(name, structure):
    encoder = make_encoder(name)
    sequences, num_context, x = make_batch(structure)
    parameters = {k: p.detach().clone().requires_grad_() for k, p in encoder.named_parameters()}
    x_actual, x_expected = (x.clone().requires_grad_() for _ in range(2))
    actual = encoder(x_actual, make_info(sequences, num_context, extra_len=1))
    expected = oracle(name, parameters, 2, sequences, num_context, x_expected)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    weight = torch.randn_like(expected)
    (actual * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x_actual.grad, x_expected.grad, rtol=1e-9, atol=1e-10)
    for k, p in encoder.named_parameters():
        torch.testing.assert_close(p.grad, parameters[k].grad, rtol=1e-9, atol=1e-10, msg=k)


@pytest.mark.parametrize("name", ENCODERS)
def test_tails_equal_all_rows_cut(name):
    encoder = make_encoder(name)
    for structure in STRUCTURES:
        sequences, num_context, x = make_batch(structure)
        tails = encoder(x, make_info(sequences, num_context))
        kept, start = [], 0
        for s in sequences:
            kept += range(start + s.length - s.tail, start + s.length)
            start += s.length
            s.tail = s.length
        everything = encoder(x, make_info(sequences, num_context))
        torch.testing.assert_close(tails, everything[kept], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_user_does_not_depend_on_batch_mates_or_padding(name):
    encoder = make_encoder(name)
    sequences, num_context, x = make_batch("context_and_candidates")
    together = encoder(x, make_info(sequences, num_context, extra_len=9))
    bounds = torch.tensor([0, *(s.length for s in sequences)]).cumsum(0)
    alone = [
        encoder(x[bounds[b] : bounds[b + 1]], make_info([s], num_context))
        for b, s in enumerate(sequences)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ENCODERS)
def test_nothing_later_enters_a_row(name):
    encoder = make_encoder(name)
    sequences = make_sequences([7], [7])
    x = torch.randn(7, DIM, dtype=torch.float64)
    before = encoder(x, make_info(sequences))
    for changed in range(7):
        y = x.clone()
        y[changed] += 1.0
        differs = (encoder(y, make_info(sequences)) != before).any(1)
        assert differs.tolist() == [row >= changed for row in range(7)]
    # Candidates see history and themselves, not each other.
    sequences = make_sequences([7], [7], [3])
    before = encoder(x, make_info(sequences))
    y = x.clone()
    y[5] += 1.0
    differs = (encoder(y, make_info(sequences)) != before).any(1)
    assert differs.nonzero()[:, 0].tolist() == [5]
    # The order of candidates does not matter.
    swapped = x[[0, 1, 2, 3, 6, 5, 4]]
    torch.testing.assert_close(
        encoder(swapped, make_info(sequences))[[0, 1, 2, 3, 6, 5, 4]], before
    )


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("lengths", [[], [0], [3, 2]])
def test_empty_batches_and_empty_tails(name, lengths):
    encoder = make_encoder(name)
    info = make_info(make_sequences(lengths, [0] * len(lengths)))
    x = torch.randn(sum(lengths), DIM, dtype=torch.float64, requires_grad=True)
    y = encoder(x, info)
    assert y.shape == (0, DIM)
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("name", ENCODERS)
def test_dropout_in_training_only(name):
    encoder = make_encoder(name, dropout=0.5)
    sequences, num_context, x = make_batch("plain")
    info = make_info(sequences, num_context)
    torch.manual_seed(3)
    first, second = encoder(x, info), encoder(x, info)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(encoder(x, info), first)
    encoder.eval()
    assert torch.equal(encoder(x, info), encoder(x, info))


@pytest.mark.parametrize("name", ENCODERS)
def test_autocast_to_bf16_stays_near_fp32(name):
    encoder = make_encoder(name).float()
    sequences, num_context, x = make_batch("context_and_candidates")
    x, info = x.float(), make_info(sequences, num_context)
    expected = encoder(x, info)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = encoder(x, info)
    assert got.dtype == torch.float32
    assert not torch.equal(got, expected)
    # bf16 keeps 8 bits: each of a dozen products in a row errs by 2^-9 of its size.
    assert (got - expected).abs().max() < 12 * 2**-8 * expected.abs().max()
    got.sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_default_widths_of_the_feed_forward_part():
    config = ModelConfig(dim=64, transformer=TransformerConfig(num_heads=2))
    assert SASRecEncoder(config).layers[0].ffn_in.out_features == 64
    # 8/3 of 64 is 170.7, rounded up to 176; gate and value.
    assert TransformerEncoder(config).layers[0].ffn_in.out_features == 2 * 176


def test_initial_weights_have_the_published_spread():
    torch.manual_seed(0)
    config = ModelConfig(dim=128, num_layers=2, transformer=TransformerConfig(num_heads=2))
    layer = SASRecEncoder(config).layers[0]
    for linear_, std in (
        (layer.query, (2 / (4 * 128)) ** 0.5),
        (layer.key_value, (2 / (4 * 128)) ** 0.5),
        (layer.output, (2 / (2 * 128)) ** 0.5),
        (layer.ffn_in, (2 / (2 * 128)) ** 0.5),
    ):
        assert linear_.weight.std().item() == pytest.approx(std, rel=0.05)
    layer = TransformerEncoder(config).layers[0]
    assert layer.query.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.ffn_out.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="must be even, got 10 / 2"):
        TransformerEncoder(ModelConfig(dim=10, transformer=TransformerConfig(num_heads=2)))
    with pytest.raises(ValueError, match="num_heads must be at least 1"):
        TransformerConfig(num_heads=0)
    with pytest.raises(ValueError, match=r"model\.transformer\.dropout"):
        TransformerConfig(dropout=1.0)
