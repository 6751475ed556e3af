"""The tiny model and texts of the pipeline's tests."""

from tests.workflow.conftest import model, texts

__all__ = ["model", "texts"]
