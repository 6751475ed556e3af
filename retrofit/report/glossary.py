"""Every measure of the report in plain words."""

from __future__ import annotations

from retrofit.report.data import RunData

_TEXTS: tuple[tuple[str, str], ...] = (
    (
        "Loss",
        "minus the natural logarithm of the probability that the model gave to the token that really came "
        "next, in nats.",
    ),
    (
        "Perplexity at L tokens",
        "the exponential of the mean loss over the first L tokens of every document, each token predicted "
        "from all tokens before it. The same documents are used at every L and for every model. A perplexity "
        "of 20 means: as unsure as a choice among 20 equally likely tokens. Only models with the same "
        "tokenizer can be compared.",
    ),
    (
        "Unseen",
        "a kind of text of which no step read anything: neither a calibration, nor a search, nor a training. A "
        "training wins back most on the kinds of text that it reads; an unseen kind shows what is lost on others. "
        "Documents that are measured are read by no step, of whichever kind they are.",
    ),
    (
        "Rank of a token",
        "its place among the distinct tokens of the texts that are measured, the most frequent first.",
    ),
    (
        "Tail perplexity",
        "the same over the last tokens before L only: the ones that have the longest context.",
    ),
    (
        "Bits per byte",
        "the loss in bits over the UTF-8 bytes of the text; comparable between tokenizers.",
    ),
    (
        "Effective length",
        "the longest measured context that the model is shown to use: at it and at every shorter measured one the end "
        "of the text is predicted as well as at the native length (set against the original, which reads the same "
        "tokens with its native context), the context beyond the native one lowers the loss of the same tokens, and a "
        "fact put into the text is found nearly as often as within the native length.",
    ),
    (
        "Context gain",
        "the mean of the loss with the native context less the loss with the longer one, on the same tokens; at the "
        "native length, against half of it.",
    ),
    (
        "LongPPL",
        "the perplexity of key tokens alone: those that lose more than 2 nats with a context of 4,096 tokens than with "
        "all of it, and less than 2 with all of it (Fang et al. 2025).",
    ),
    (
        "Common knowledge",
        "questions that most people answer without thinking, each with four answers of which one is right; four "
        "questions share the same four answers, so that a model that only prefers some answers to others is right in a "
        "quarter (chance). A score is called not distinguishable from chance where guessing would reach it at least "
        "once in twenty times.",
    ),
    (
        "Task score",
        "the task's own metric over its questions, as lm-evaluation-harness asks and scores them: `acc` is the share "
        "of questions whose right answer the model finds likeliest, `acc_norm` the same with the likelihood divided by "
        "the answer's length, `exact_match` the share answered word for word. ± is one standard error: how much the "
        "score would vary with other questions of the kind. The difference of two models on the same questions is "
        "known better than that, from those they answer differently.",
    ),
    (
        "p (McNemar)",
        "how often chance alone, a fair coin for each question that only one of two models answers right, would be as "
        "one-sided as what was counted. Small: the models differ.",
    ),
    (
        "95% interval",
        "percentile bootstrap: the measured losses are drawn again with replacement, the perplexity is "
        "computed each time, and 95% of the results lie within the interval. It says how much the number "
        "depends on the documents chosen, not how other kinds of text would do. A ratio's interval that holds 1 "
        "does not show that nothing was lost: a loss of up to its upper end is compatible with the "
        "data.{units}",
    ),
    (
        "KV cache",
        "the keys and values of all tokens read so far, kept in memory while text is generated; it grows with"
        " every token and with the number of key/value (KV) heads.",
    ),
    (
        "Prefill, decode",
        "a prefill reads a prompt in one pass and gives the first token of the answer; decoding makes the others one "
        "by one, each reading all weights and the KV cache. Each is timed in several short rounds, the models in turn. "
        "A factor is given only where every round of one model is faster than every round of the other, and the rounds "
        "of neither differ from each other by more than the two models do.",
    ),
    (
        "Context length",
        "the number of tokens the model can read at once, prompt and answer together.",
    ),
    (
        "Native context length",
        "that of the model before this run.",
    ),
    (
        "Keys lost, values lost",
        "the part of the attention scores' and of the attention output's energy, on the calibration text, "
        "that the shared heads cannot represent.",
    ),
    (
        "Held-out error",
        "how far a layer's attention output is from the original's on text the repair was not fitted on, as a"
        " share of the original's energy.",
    ),
    (
        "Peak memory",
        "the most memory the process held during the step, model included.",
    ),
)


def definitions(run: RunData) -> tuple[tuple[str, str], ...]:
    """(measure, meaning); the bootstrap's unit is the one this run used."""
    units = sorted({row.unit for model in run.models for row in model.rows if row.unit})
    drawn_over = f" Drawn over: {', '.join(units)}." if units else ""
    return tuple((name, text.format(units=drawn_over)) for name, text in _TEXTS)
