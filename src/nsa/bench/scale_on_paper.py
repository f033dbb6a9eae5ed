"""What many GPUs would give, on paper: operations and bytes are counted, rates are those that were measured on two.

    layer   ms = operations / (P x the rate of one GPU) + bytes that a rank receives / rate of the exchanges
    step    the same, once more forward (gradient checkpointing); FSDP's bytes lie under a longer computation

Of a layer's exchanges nothing is taken to be hidden; all GPUs to be equally busy (zig-zag), and the kernels to be as
fast on a P-th of the queries as on all. What P GPUs wait for each other is not in it.
"""

from nsa.bench.scale_arguments import ScaleArguments
from nsa.config import NSAConfig
from nsa.costs.flops import flops_per_token, mean_keys, weights_per_token
from nsa.models import NSALlamaConfig
from nsa.models.loss import CHUNK
from nsa.report.table import Table
from nsa.training.presets import preset
from nsa.training.sizes import model_config

GPUS, A_HOST = (1, 2, 8, 64), 8
LAYER_LENGTH, ROW_LENGTH, ROW_GPUS = 131072, 524288, 2  # of what was measured
LOW, HIGH = 2, 4  # bytes of bf16, of fp32


def text(arguments: ScaleArguments) -> str:
    """Both tables, in Markdown, with the rates above them."""
    head = (
        f"On paper: counted operations and bytes, at rates measured on two H200 (a layer of {LAYER_LENGTH:,} tokens "
        f"{arguments.measured_layer_ms:.1f} ms on one GPU, a step of the {arguments.preset} preset on a row of "
        f"{ROW_LENGTH:,} tokens {arguments.measured_row_ms / 1e3:.1f} s on two, exchanges "
        f"{arguments.measured_exchange_gb_s:.0f} GB/s); beyond {A_HOST} GPUs {arguments.network_gb_s:.0f} GB/s, "
        "assumed."
    )
    return "\n\n".join([head, layers(arguments).markdown(), steps(arguments).markdown()])


def blocks_of_a_chunk(t: int, config: NSAConfig) -> int:
    """Room for the compressed keys that end in one of the two chunks of a rank's t tokens."""
    return (t // 2 + config.compress_block_size - 1) // config.compress_stride


def bytes_of_a_layer(length: int, ranks: int, width: int, config: NSAConfig) -> tuple[int, int]:
    """Bytes that a rank receives in forward and in backward: keys and values in bf16 of `width` = HK D elements."""
    if ranks == 1:
        return 0, 0
    t = length // ranks
    gathered = 2 * (ranks - 1) * (t + 2 * blocks_of_a_chunk(t, config)) * width  # elements of k and v
    halos = 2 * 2 * (config.window_size - 1 + config.compress_block_size - 1) * width
    return gathered * LOW + halos * LOW, gathered * HIGH + halos * LOW


def rate_between(ranks: int, arguments: ScaleArguments) -> float:
    """Bytes a second."""
    return 1e9 * (arguments.measured_exchange_gb_s if ranks <= A_HOST else arguments.network_gb_s)


def layers(arguments: ScaleArguments) -> Table:
    """A layer, forward and backward, its sequence shared by P GPUs."""
    config = NSALlamaConfig(
        attention="nsa", hidden_size=arguments.hidden_size, num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads, head_dim=arguments.head_dim, num_hidden_layers=1, intermediate_size=1,
        vocab_size=1, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip

    def operations(length: int) -> float:
        return length * flops_per_token(config, mean_keys(config)(length))

    rate = operations(LAYER_LENGTH) / arguments.measured_layer_ms
    rows = []
    for length in arguments.lengths:
        alone = operations(length) / rate
        for ranks in GPUS:
            received = sum(bytes_of_a_layer(length, ranks, arguments.kv_heads * arguments.head_dim, config.nsa_config))
            exchanges = received / rate_between(ranks, arguments) * 1e3
            ms = alone / ranks + exchanges
            cells = f"{alone / ranks:.1f}", f"{received / 1e9:.2f}", f"{exchanges:.1f}", f"{alone / ms:.2f}"
            rows.append([f"{length:,}", f"{ranks}", *cells])
    header = ["tokens", "GPUs", "computation, ms", "GB received a rank", "exchanges, ms", "times one GPU"]
    return Table("a layer, forward + backward", header, rows)


def steps(arguments: ScaleArguments) -> Table:
    """A training step of the preset's model on one row that P GPUs share, weights sharded over them."""
    train = preset(arguments.preset)
    config = model_config(train, attention="nsa")
    nsa, hidden, num_layers = config.nsa_config, config.hidden_size, config.num_hidden_layers
    width, weights = config.num_key_value_heads * config.head_dim, weights_per_token(config)
    outside = hidden * config.vocab_size  # embedding and head are one, and stay fp32

    def operations(length: int) -> float:
        return length * flops_per_token(config, mean_keys(config)(length))

    rate = operations(ROW_LENGTH) / (arguments.measured_row_ms * ROW_GPUS)
    rows = []
    for length in (*arguments.lengths, ROW_LENGTH, 2 * ROW_LENGTH):
        for ranks in GPUS[1:]:
            compute, others = operations(length) / rate / ranks, (ranks - 1) / ranks
            forward, backward = bytes_of_a_layer(length, ranks, width, nsa)
            exchanged = num_layers * (2 * forward + backward)
            sharded = others * ((weights - outside) * (2 * LOW + HIGH) + outside * 2 * HIGH)
            per_ms = rate_between(ranks, arguments) / 1e3
            ms = max(compute, sharded / per_ms) + exchanged / per_ms
            t = length / ranks
            held = 4 * HIGH * weights / ranks + num_layers * t * hidden * HIGH
            held += t * (4 * config.intermediate_size + 12 * hidden) * LOW  # one layer, while it is computed again
            held += 2 * length * width * LOW * (2 + 1 / nsa.compress_stride) + CHUNK * (2 * HIGH + LOW)
            rows.append(
                [
                    f"{length:,}", f"{ranks}", f"{compute:,.0f}", f"{exchanged / 1e9:.1f}", f"{sharded / 1e9:.1f}",
                    f"{ms:,.0f}", f"{length / ms * 1e3:,.0f}", f"{held / 2**30:.0f}",
                    f"{ms / 3.6e6 * ranks / length * 1e9:,.0f}",
                ]
            )  # fmt: skip
    header = [
        "tokens of the row", "GPUs", "computation, ms", "GB of keys, values", "GB of weights, gradients", "step, ms",
        "tokens/s", "GiB a GPU", "GPU hours for 1e9 tokens",
    ]  # fmt: skip
    return Table(f"a step of {arguments.preset}, one row", header, rows)
