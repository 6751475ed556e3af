"""What steps cost: operations counted from a model's shape, over a stated throughput. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from retrofit.evaluation.running import GPU_BATCHES, LOOP_STEPS
from retrofit.kernels.availability import CAPTURE_WARM_UP
from retrofit.model.spec import AttentionSpec
from retrofit.recipe.schema import Evaluate
from retrofit.system.device import sampled_sequences

BASE_BYTES = 700 << 20  # a Python process with torch and transformers imported
EFFICIENCY = 0.5  # share of matrix-multiplication speed that a whole forward pass reaches
CALL_SECONDS = 0.001  # of the Python code of one layer that decodes one token
LAYER_LAUNCHES = 100  # launches of bare kernels that take as long as one layer's pass through transformers launches
ADAPTER_LAUNCHES = 2.5  # how many times as long a layer takes whose projections carry adapters
SOLVE_LAUNCHES = 60_000  # the same, of a layer's moments, grouping and refits in a calibrated conversion
DISK_BYTES_PER_SECOND = 1.5e9  # of weights that are read, checked, digested or written, where nothing is known
SAMPLE_TOKENS = 512  # of one sample of the original model
DRAW_BYTES = 24  # of memory that are read and written for each logit when a token is drawn
GRAPH_LAUNCHES = 0.15  # of the time of launching a step's kernels, when the step is replayed
GPU_BYTES = 80 << 30  # of memory, where a plan asks how many samples are written together
CHUNK, GPU_CHUNK = 512, 8192  # tokens of a forward call of a search, where no evaluation says how many
TOKEN_BYTES = 4  # of a task's prompts, where no tokenizer is at hand
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Throughput:
    """Floating-point operations per second of large matrix products, and how the numbers were made.

    float32: of the moments and refits of a conversion; flops: of training and scoring, in bfloat16 where it is faster.
    launch_seconds: of launching one small kernel on a GPU, which is what a small model waits for; 0 on a CPU, where
    that is part of the work. gpus: as many as a run is started on, one process each; link_bytes_per_second: what one of
    them sends to another while it receives as much, None where it is not known.
    """

    flops: float
    float32: float
    how: str
    bytes_per_second: float = 10e9
    launch_seconds: float = 0.0
    disk_bytes_per_second: float = DISK_BYTES_PER_SECOND
    gpus: int = 1
    link_bytes_per_second: float | None = None


ASSUMED = Throughput(50e9, 50e9, "assumed 50 GFLOP/s, not measured on this machine")


@dataclass(frozen=True)
class ModelFacts:
    """What a plan needs to know of a model. parameters: of the whole model; dtype: of the stored weights."""

    model: str
    spec: AttentionSpec
    parameters: int
    dtype: str

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights as stored."""
        return self.parameters * DTYPE_BYTES.get(self.dtype, 2)


@dataclass(frozen=True)
class TaskSize:
    """What asking one task takes. requests of request_bytes each, longest_bytes: the longest, generated: most tokens of
    all answers; estimated on the task's first questions, the number of questions is known. together: requests read at a
    time, where the task decides that itself. making: seconds of making its prompts, in every command."""

    name: str
    questions: int
    requests: int
    request_bytes: float
    longest_bytes: int
    generated: int
    together: int | None = None
    making: float = 0.0


@dataclass(frozen=True)
class Cost:
    """One step: what it does, the most memory and disk it needs (bytes), and its seconds in all.

    piece_seconds: of each part that the journal keeps for itself (the models that are scored, the original first).
    task_seconds: of each task that every one of these models is asked, kept for itself too.
    """

    step: str
    does: str
    peak_bytes: int
    disk_bytes: int
    seconds: float
    piece_seconds: tuple[float, ...] = ()
    task_seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CostModel:
    """Costs of passes over one model. after: its attention at the end of the recipe. claimed: positions then. tasks:
    those that are asked of it. processes: of the launcher."""

    facts: ModelFacts
    after: AttentionSpec
    throughput: Throughput
    claimed: int
    tasks: tuple[TaskSize, ...] = ()
    processes: int = 1

    @property
    def native(self) -> int:
        """Positions before the recipe."""
        return self.facts.spec.max_position_embeddings

    @property
    def value_bytes(self) -> int:
        """Bytes of a stored value."""
        return DTYPE_BYTES.get(self.facts.dtype, 2)

    @property
    def matmul_parameters(self) -> int:
        """Parameters that a token is multiplied with: all but an untied embedding table."""
        spec = self.facts.spec
        return self.facts.parameters - (0 if spec.tied_embeddings else spec.vocab_size * spec.hidden_size)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        spec = self.facts.spec
        tables = (1 if spec.tied_embeddings else 2) * spec.vocab_size * spec.hidden_size
        return max(0, self.facts.parameters - tables) // len(spec.layers)

    @property
    def training_bytes(self) -> int:
        """Bytes of a number in training: it runs in bfloat16 where that is faster."""
        return 2 if self.throughput.flops > self.throughput.float32 else 4

    def flops(self, tokens: int, context: int) -> float:
        """Of one forward pass over `tokens` tokens in sequences of `context`: matrices, and causal attention."""
        scores = sum(4 * layer.query_heads * layer.head_dim for layer in self.after.layers)
        return tokens * (2 * self.matmul_parameters + scores * context / 2)

    @property
    def launching(self) -> float:
        """Seconds that launching the kernels of one forward pass takes, whatever its size; 0 on a CPU."""
        return LAYER_LAUNCHES * self.throughput.launch_seconds * len(self.facts.spec.layers)

    @property
    def call_seconds(self) -> float:
        """Seconds of Python and launches in a forward pass that decodes one token."""
        return CALL_SECONDS * len(self.facts.spec.layers) + self.launching

    def dealt(self, units: int) -> float:
        """The share of the busiest process where so many equal pieces of work are dealt out to all."""
        return -(-units // self.throughput.gpus) / units if units else 1.0

    def disk_seconds(self, passes: float) -> float:
        """Of reading or writing all weights `passes` times."""
        return passes * self.facts.weight_bytes / self.throughput.disk_bytes_per_second

    def run_seconds(self, tokens: int, evaluate: Evaluate) -> float:
        """Of a prefill of `tokens` tokens and decoding after it, batches included."""
        graphs = self.throughput.launch_seconds > 0
        default = GPU_BATCHES if graphs else ()
        batches = (
            (default if evaluate.cost_batches is None else evaluate.cost_batches) if evaluate.decode_tokens else ()
        )
        launched = (
            min(LOOP_STEPS, evaluate.decode_tokens) + CAPTURE_WARM_UP + 2 if graphs else evaluate.decode_tokens + 1
        )
        steps = evaluate.decode_tokens + launched * len(batches)
        return self.seconds(tokens, tokens) + steps * self.decode_seconds(tokens)

    def decode_seconds(self, tokens: int) -> float:
        """Of one token after `tokens` others: weights and cache are read."""
        spec = self.facts.spec
        read = self.facts.weight_bytes + spec.kv_cache_bytes(tokens, DTYPE_BYTES.get(self.facts.dtype, 2))
        return read / self.throughput.bytes_per_second + self.call_seconds

    def sampling_seconds(self, tokens: int) -> float:
        """Of samples that the original writes, many at a time: every step reads all weights and half of a full cache,
        and multiplies them with its rows; then a token is drawn of each row of logits."""
        spec, gpu = self.facts.spec, self.throughput.launch_seconds > 0
        together, length, value = self._sampled_together
        sequences, seconds = -(-tokens // length), 0.0
        for rows in {together, sequences % together} - {0}:
            read = self.facts.parameters * value + rows * spec.kv_cache_bytes(length // 2, value)
            reading = read / self.throughput.bytes_per_second
            multiplying = 2 * rows * self.matmul_parameters / (self.throughput.flops * EFFICIENCY)
            drawing = DRAW_BYTES * rows * spec.vocab_size / self.throughput.bytes_per_second
            calls = GRAPH_LAUNCHES * self.launching if gpu else CALL_SECONDS * len(spec.layers)
            batches = sequences // together if rows == together else 1
            seconds += batches * length * (max(reading, multiplying) + drawing + calls)
        return seconds * self.dealt(-(-sequences // together))

    @property
    def sampling_bytes(self) -> int:
        """Of the model that samples: its weights, and the cache of all samples that are written together."""
        together, length, value = self._sampled_together
        return self.facts.parameters * value + together * self.facts.spec.kv_cache_bytes(length, value)

    @property
    def _sampled_together(self) -> tuple[int, int, int]:
        """(samples that are written together, tokens of each, bytes of a number)."""
        gpu = self.throughput.launch_seconds > 0
        length, value = min(SAMPLE_TOKENS, self.native), 2 if gpu else self.training_bytes
        device, memory = ("cuda", GPU_BYTES) if gpu else ("cpu", None)
        return sampled_sequences(device, self.facts.spec, length, value, memory=memory), length, value

    def task_seconds(self, task: TaskSize, batch_size: int) -> float:
        """Of one model's answers: every request is read, weights and all, and answers are generated to their limit."""
        tokens = max(1, round(task.request_bytes / TOKEN_BYTES))
        calls = -(-task.requests // (task.together or batch_size))
        call = tokens * (task.together or 1)
        reading = self.seconds(task.requests * tokens, tokens, call=call) + calls * self.decode_seconds(tokens)
        return reading + task.generated / batch_size * self.decode_seconds(tokens)

    def prefill_bytes(self, tokens: int) -> int:
        """What one pass over `tokens` tokens holds beside the weights: the outputs of a layer, and the cache."""
        spec = self.facts.spec
        return 4 * tokens * (self.layer_parameters // spec.hidden_size) + spec.kv_cache_bytes(tokens, 4)

    def attention_flops(self, tokens: int, context: int) -> float:
        """Of one forward pass through the attention of every layer alone."""
        width = self.facts.spec.hidden_size
        matrices = sum(4 * width * x.head_dim * (x.query_heads + x.kv_heads) for x in self.after.layers)
        scores = sum(4 * x.query_heads * x.head_dim for x in self.after.layers)
        return tokens * (matrices + scores * context / 2)

    def seconds(
        self,
        tokens: int,
        context: int,
        passes: float = 1,
        *,
        float32: bool = False,
        call: int | None = None,
        launches: float = 1.0,
    ) -> float:
        """Of `passes` forward passes over `tokens` tokens, `call` at a time (by default a sequence of `context`).

        Whichever takes longest: multiplying, reading the weights at every call, or launching the kernels of every call
        (`launches` times as many as a plain layer has).
        """
        speed, calls = (
            self.throughput.float32 if float32 else self.throughput.flops,
            passes * tokens / (call or context),
        )
        multiplying = passes * self.flops(tokens, context) / (speed * EFFICIENCY)
        reading = calls * self.facts.weight_bytes / self.throughput.bytes_per_second
        return max(multiplying, reading, calls * launches * self.launching)
