"""What a command has opened, once: the model, its configuration and weights, its text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.checkpoint.extensions import held_scale
from retrofit.errors import UserError
from retrofit.kernels.placement import zigzag
from retrofit.kernels.registry import KernelChoice, choose, split_kernel
from retrofit.model.folder import ModelFolder
from retrofit.model.inspect import count_parameters
from retrofit.model.source import Source
from retrofit.model.spec import AttentionSpec
from retrofit.recipe.schema import Evaluate, Recipe, TextSource
from retrofit.system.world import ALONE, World
from retrofit.workflow.artifact import Artifact, Provenance
from retrofit.workflow.estimate.cost import ASSUMED, ModelFacts, Throughput
from retrofit.workflow.plan import Plan, claimed_length, make_plan
from retrofit.workflow.questions import sizes
from retrofit.workflow.samples import samples_of
from retrofit.workflow.step import Step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from retrofit.console import Progress
    from retrofit.data.documents import Document
    from retrofit.data.samples import Teacher
    from retrofit.evaluation.tasks.harness import Harness


@dataclass
class ModelContext:
    """One command's model and everything around it. steps: of its recipe. original_source: the model before the
    surgery, where that is another one than `source`. allow_extrapolation: lengths may be longer than the window.
    alone: the one step of a command. processes: of the launcher. requested: the recipe before its relative lengths
    became numbers.

    documents: to measure on; empty until texts are read. shared: by kind of them, the kinds of text read by steps that
    hold some of it. harness: the tasks to ask, with their data. notes: what a
    person should know.
    """

    recipe: Recipe
    steps: tuple[Step, ...]
    source: Source
    original_source: Source
    device: str
    world: World = ALONE
    processes: int = 1
    throughput: Throughput = ASSUMED
    allow_extrapolation: bool = False
    alone: bool = False
    requested: Recipe | None = None
    progress: Progress | None = None
    documents: tuple[Document, ...] = ()
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    harness: Harness | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> ModelFolder:
        """The model's folder."""
        return self.source.model

    @property
    def original_model(self) -> ModelFolder:
        """The folder of the model before the surgery."""
        return self.original_source.model

    def held_scale(self, folder: Path) -> float:
        """What earlier extensions multiplied the queries in `folder` with. The record of a run's own folders begins at
        the run's original, which may have been extended before."""
        return math.prod(held_scale(one) for one in {folder, self.original_model.path})

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def spec(self) -> AttentionSpec:
        """What the model's attention is."""
        return self.model.spec

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.model.tokenizer

    @property
    def native(self) -> int:
        """Positions of the model."""
        return self.spec.max_position_embeddings

    @property
    def claimed(self) -> int:
        """Positions after the recipe."""
        return claimed_length(self.recipe, self.native)

    @cached_property
    def kernel(self) -> KernelChoice:
        """The kernel that the evaluated models are read with."""
        return choose(self.recipe.kernel, self.spec, self.device)

    @cached_property
    def samples(self) -> Teacher:
        """The original model, for text that it samples itself."""
        return samples_of(self.recipe, self.original_model, self.device)

    @cached_property
    def facts(self) -> ModelFacts:
        """What a plan needs to know of the model; no weights are read."""
        parameters = count_parameters(self.model.path, self.config)
        return ModelFacts(self.source.requested, self.spec, parameters, self.source.dtype)

    @cached_property
    def plan(self) -> Plan:
        """What the recipe would do and cost."""
        size = sizes(self.recipe.evaluate, self.harness)
        return make_plan(self.recipe, self.facts, self.throughput, size, self.processes)

    @property
    def device_kind(self) -> str:
        """cpu or cuda: what results may depend on, whichever GPU it is."""
        return self.device.partition(":")[0]

    def alone_in_world(self) -> ModelContext:
        """The same for what this process does by itself."""
        context = copy(self)
        context.world = ALONE
        return context

    def artifact(self, question: str | None = None) -> Artifact:
        """The model as what the first step reads. question: of a command of one step."""
        return Artifact(self.model, dict(self.source.digests), Provenance.of(self.source, question))

    def require_kernel(self, dtype: str) -> None:
        """UserError unless the kernel exists for what a step does, in the dtype that it is asked to do it in."""
        working = self.model.working_dtype(dtype, self.device)
        choose(self.recipe.kernel, self.spec, self.device, dtype=self.source.dtype if working == "auto" else working)

    def require_splittable(self, where: str, processes: int, tokens: int) -> None:
        """UserError unless one sequence can be shared out over `processes`: the kernel, the attention, this device.

        where: the setting that asks for it. tokens: of the shortest sequence.
        """
        try:
            split_kernel(self.recipe.kernel, self.spec, self.device)
            zigzag(tokens, processes)
        except UserError as error:
            raise UserError(error.what, where=", ".join(filter(None, (where, error.where))), fix=error.fix) from error

    def note(self, *notes: str) -> None:
        """Lines for the person who waits."""
        for note in notes if self.progress else ():
            self.progress.note(note)  # type: ignore[union-attr]

    def choose_documents(self, section: Evaluate, *, sample: bool) -> Iterable[str]:
        """Choose what is measured, none of it read by any step; returns notes on what was left out.

        sample: the model may be asked to write its own text.
        """
        from retrofit.data.measured import read_before, recorded_text, scored_documents
        from retrofit.data.texts import OWN_SAMPLES
        from retrofit.data.unseen import Findings
        from retrofit.evaluation.long_context import definitions_of
        from retrofit.workflow.checks import require_prose
        from retrofit.workflow.reading import most_read

        read = read_before(section.text, self.model.path)
        text = [one for one in section.text if sample or one.source != OWN_SAMPLES]
        if not text:
            return read.values()
        findings = Findings()
        documents = scored_documents(
            text,
            self.tokenizer,
            length=max(*section.lengths, section.document_tokens or 0),
            count=section.documents,
            trained_on=(*self.texts(learning=True), *read),
            also_read=recorded_text(self.model.path),
            teacher=self.samples,
            read_chars=most_read(self.recipe, self.claimed),
            lengths=section.lengths,
            loss_on=section.loss_on,
            findings=findings,
        )
        prose = [document for document in documents if document.scored is None]
        require_prose(section, prose)
        definitions_of(section, prose, self.tokenizer)  # raises for a text that is too short for one of them
        self.documents = tuple(documents)
        self.shared = {kind: tuple(sorted(kinds)) for kind, kinds in findings.shared.items()}
        return (*read.values(), *findings.notes)

    def seen_by(self, artifact: Artifact) -> dict[str, tuple[str, ...]]:
        """What the steps that made a checkpoint have read text of each measured kind for: see `data.seen`."""
        from retrofit.data.measured import recorded_steps
        from retrofit.data.seen import seen

        # The record of a run's own folders begins at the run's original, which may have been made by steps before.
        folders = [artifact.path] if self.alone else dict.fromkeys((self.model.path, artifact.path))
        steps = [step for folder in folders for step in recorded_steps(folder)]
        return seen(dict.fromkeys(document.kind for document in self.documents), steps, self.shared)

    def texts(self, *, learning: bool = False) -> tuple[TextSource, ...]:
        """All text that the steps read. learning: only what they fit something to."""
        return tuple(text for step in self.steps if step.learns or not learning for text in step.texts)
