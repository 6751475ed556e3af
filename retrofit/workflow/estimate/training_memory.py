"""The memory of adapter training, counted from the model's shape: what autograd keeps, and what stands beside it.

At its peak a step of training holds the weights, the tensors that the backward pass of every layer needs, and two
chunks of logits, in what is computed in; and in float32 the adapters with Adam's two moments and the best state so far.
Their gradients come when the logits and most layers have gone. Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

from retrofit.model.spec import AttentionSpec, LayerAttention
from retrofit.recipe.recovery import distils
from retrofit.recipe.schema import Adapter, Recover

FLOAT32 = 4
# What a layer frees in its forward pass leaves holes in the C library's heap: small tensors that stay come to lie in
# them, and large ones no longer fit. By glibc's own count (mallinfo2), tensors [rows, width] for each layer:
HOLES = 7
HOLES_CHECKPOINTED = 4  # where nothing but a layer's input stays, though up to 7 were seen
MAPPED_BYTES = 32 << 20  # from this size on glibc gives a tensor pages of its own, which go back whole


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes by what holds them. teacher: what is not the student's own. kept: by autograd, until the backward pass.

    adapters: with Adam's two moments and the best state so far. holes: in the heap. logits: or the gradients of a layer
    in the backward pass, where those are more.
    """

    weights: int
    teacher: int
    adapters: int
    kept: int
    holes: int
    logits: int

    @property
    def total(self) -> int:
        """All of it; the process itself comes on top."""
        return self.weights + self.teacher + self.adapters + self.kept + self.holes + self.logits


def training_memory(
    spec: AttentionSpec, original: AttentionSpec, parameters: int, recover: Recover, value: int
) -> TrainingMemory:
    """The peak of one training. spec, original: of the student and its teacher. parameters: of the whole model.

    value: bytes of a number in the dtype that is computed in (4: float32, 2: bfloat16).
    """
    adapter, width = recover.adapter, spec.hidden_size
    rows = recover.batch_size * recover.sequence_length
    trained = trained_parameters(spec, adapter)
    tensor = rows * width * value
    layers = [kept_per_token(spec, layer, adapter, value) * rows for layer in spec.layers]
    kept = 2 * tensor  # the final norm's input, and the gradient that the loss gives back
    working = max(layers)  # gradients of one layer's tensors, each as large as the tensor
    if recover.gradient_checkpointing:
        kept += tensor * len(layers)
        working += max(layers)  # made again, one layer at a time
    else:
        kept += sum(layers)
        kept += value * trained if value < FLOAT32 else 0  # the adapters as they are multiplied with
    holes = HOLES_CHECKPOINTED if recover.gradient_checkpointing else HOLES
    distill = distils(recover)
    logits = (1 + distill) * min(rows, recover.row_chunk) * spec.vocab_size * value
    # What the surgery changed, the rest is the student's own; and what the teacher says of the held-out text.
    attention = sum(width * x.head_dim * 2 * (x.query_heads + x.kv_heads) for x in original.layers)
    teacher = value * (attention + recover.eval_tokens * width)
    return TrainingMemory(
        weights=parameters * value,
        teacher=teacher if distill else 0,
        adapters=4 * FLOAT32 * trained,
        kept=kept,
        holes=0 if tensor >= MAPPED_BYTES else holes * tensor * len(layers),
        logits=max(logits, working),
    )


def kept_per_token(spec: AttentionSpec, layer: LayerAttention, adapter: Adapter, value: int) -> int:
    """Bytes that autograd keeps of one token in one layer, for the backward pass of a model whose adapters are trained.

    Norms keep their input (RMS norms in float32), attention its queries, keys, values, result and log-sum-exp, the MLP
    what `MLP.kept` says, and an adapter its input and what its first matrix makes of it.
    """
    width, mlp = spec.hidden_size, spec.mlp
    queries, keys = layer.query_heads * layer.head_dim, layer.kv_heads * layer.head_dim
    adapted = adapter.mlp and mlp.adaptable > 0
    norms = 2 * width * (FLOAT32 if mlp.gated else value)
    if layer.qk_norm:
        norms += FLOAT32 * (queries + keys)
    attention = value * 2 * (queries + keys)
    if value == FLOAT32:
        attention += FLOAT32 * layer.query_heads
    elif adapter.attention:
        attention += value * queries  # `products` gives its result head by head: the output projection reads a copy
    hidden = value * (mlp.kept * mlp.width - (0 if adapted else mlp.width))  # frozen matrices need no input
    inputs = value * width * (adapter.attention + adapted)
    matrices = adapter.attention * (_inputs(layer) + 1) + adapted * (3 if mlp.gated else 2)
    down = value * adapter.rank * matrices
    return norms + attention + hidden + inputs + down


def trained_parameters(spec: AttentionSpec, adapter: Adapter) -> int:
    """Parameters of LoRA on the projections that `adapter` names, and of what it trains in full."""
    width, mlp = spec.hidden_size, spec.mlp
    count = 0
    if adapter.attention:
        ends = sum(2 * x.head_dim * (x.query_heads + x.kv_heads) for x in spec.layers)
        count += ends + width * sum(_inputs(layer) + 1 for layer in spec.layers)
    if adapter.mlp and mlp.adaptable:
        count += len(spec.layers) * (3 if mlp.gated else 2) * (width + mlp.adaptable)
    count *= adapter.rank
    if adapter.embeddings:
        count += ((1 if spec.tied_embeddings else 2) * spec.vocab_size + (spec.learned_positions or 0)) * width
    if adapter.sinks:
        count += sum(layer.query_heads for layer in spec.layers if layer.sinks is not None)
    return count


def _inputs(layer: LayerAttention) -> int:
    """Matrices that make queries, keys and values: three, or one where they are stored together."""
    return len({layer.q.name, layer.k.name, layer.v.name})
