"""Dialogues, and chat templates of several habits, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEAD = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = (
    HEAD
    + "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    + "{% for call in m['tool_calls'] or [] %}{{ call | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    + ASK
)
"""A turn is written the same whatever follows."""
GENERATION = (
    HEAD
    + "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    + "{{ m['content'] }}{% for call in m['tool_calls'] or [] %}{{ call | tojson }}{% endfor %}<|im_end|>"
    + "{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    + ASK
)
"""The same, and the template tells what is the assistant's."""
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>') | last }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}" + ASK
)
"""Thoughts are written of the last answer alone."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather_at",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}


def says(*texts: str, system: str | None = None) -> dict[str, Any]:
    """A row of `messages`: user and assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


def small_talk(count: int) -> list[dict[str, Any]]:
    """Rows of one to three exchanges, each with words of its own."""
    return [
        says(
            *[
                f"{word} {i} of {turn}?" if word == "Which" else f"Number {i * 7 + turn}!" * (1 + i % 3)
                for turn in range(1 + i % 3)
                for word in ("Which", "Number")
            ]
        )
        for i in range(count)
    ]


def write_rows(file: Path, rows: list[Any]) -> Path:
    """JSONL of the rows; text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file
