"""What the head benchmark reads: text for fits, of the table's kind and of others, and what it scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.recipe.schema import Calibration, TextSource

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from retrofit.data.documents import Document
    from retrofit.data.packing import Packed

LENGTH = 1024  # tokens of a scored piece, a calibration sequence and a training sequence
PIECES = 10
GRAM = 8  # tokens in a row that two texts share only where one was cut from the other, or by rare chance
OTHER = ("python-docs", "python-stdlib", "self")
HELD_OUT = "moby_dick.txt"
UNREAD = "unread pages"
SEEN = "calibration text"


class Texts:
    """The benchmark's text. same: the sources of the table's kind; other: the built-in ones of other kinds; also:
    files that join the other ones in some rows, by name; distil: tokens of all trainings, which read `same`."""

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        books: Path | None,
        tokens: int,
        distil: Sequence[int],
        also: Sequence[Path] = (),
    ) -> None:
        self.folder, self.tokenizer, self.books, self.tokens, self.distil = folder, tokenizer, books, tokens, distil
        self.also = {path.name: TextSource(source=str(path)) for path in also}
        self.novels = sorted(path for path in books.glob("*.txt") if path.name != HELD_OUT) if books else []
        same = [str(path) for path in self.novels] or ["python-docs"]
        self.same = [TextSource(source=name) for name in same]
        self.other = [TextSource(source=name) for name in OTHER if name not in same]

    def calibration(self, sources: Sequence[TextSource]) -> Any:
        """What a conversion is calibrated on."""
        from retrofit.data.calibration import calibration_text
        from retrofit.data.samples import Teacher

        section = Calibration(text=tuple(sources), tokens=self.tokens, sequence_length=LENGTH)
        teacher = Teacher(self.folder, tokens=self.tokens // 3)
        return calibration_text(section, self.tokenizer, seed=0, teacher=teacher)

    def training(self, tokens: int) -> Packed:
        """What adapters are trained on: the table's kind of text."""
        from retrofit.data.packing import training_rows

        return training_rows(self.same, self.tokenizer, tokens, LENGTH, seed=1)

    def scored(self) -> Iterator[Document]:
        """PIECES pieces of LENGTH tokens: of each held-out text (that of the table, and two built-in kinds); of the
        books that fits have read, but of pages that none of them has; and of the calibration text, where fits look
        better than they are."""
        from retrofit.data.texts import read_texts

        texts = {} if self.books is None else {Path(HELD_OUT).stem: (self.books / HELD_OUT).read_text("utf-8")}
        for kind in ("python-docs", "python-stdlib"):
            held_out = read_texts(TextSource(source=kind), split="held_out")
            texts[kind] = "\n\n".join(text.text for text in held_out)[:1_500_000]
        for kind, text in texts.items():
            ids = self.tokenizer(text, add_special_tokens=False).input_ids
            step = (len(ids) - LENGTH) // PIECES
            for i in range(PIECES):
                yield self._document(kind, i, self._piece(ids, i * step))
        seen_NT = self.calibration(self.same).input_ids_NT.numpy()
        if self.novels:
            read = [seen_NT, *(self.training(tokens).ids_NT.numpy() for tokens in self.distil)]
            pages = self.unread(read)
            if not pages:
                print(f"{UNREAD}: left out, fits have read nearly all of these books", flush=True)
            for i, piece in enumerate(pages):
                yield self._document(UNREAD, i, piece)
        for i in range(PIECES):
            yield self._document(SEEN, i, seen_NT[i * len(seen_NT) // PIECES])

    def unread(self, read: Sequence[np.ndarray]) -> list[np.ndarray]:
        """PIECES pieces of the novels that share no GRAM tokens in a row with the rows of `read`, but for a chance few;
        none where so many are not left."""
        grams = {tuple(row[i : i + GRAM]) for rows in read for row in rows.tolist() for i in range(len(row) - GRAM + 1)}
        found = []
        for path in self.novels:
            ids = self.tokenizer(path.read_text("utf-8"), add_special_tokens=False).input_ids
            for start in range(0, len(ids) - LENGTH, LENGTH):
                piece = self._piece(ids, start).tolist()
                shared = sum(tuple(piece[i : i + GRAM]) in grams for i in range(LENGTH - GRAM + 1))
                if shared < GRAM:
                    found.append(self._piece(ids, start))
        return [found[i * len(found) // PIECES] for i in range(PIECES)] if len(found) >= PIECES else []

    def _piece(self, ids: Sequence[int], start: int) -> np.ndarray:
        """LENGTH tokens as a context begins: BOS, where the tokenizer has one, then text from `start`."""
        import numpy as np

        bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        return np.array(bos + list(ids[start : start + LENGTH - len(bos)]), np.int64)

    def _document(self, kind: str, index: int, ids: np.ndarray) -> Document:
        from retrofit.data.documents import Document

        return Document(f"{kind} {index}", kind, ids, len(str(self.tokenizer.decode(ids)).encode()))
