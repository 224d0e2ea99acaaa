"""Evaluation tasks: one file each, and the file's name is the task's name. Reached only through
`joulemark.plugins.load`.

A task module offers

    VERSION: str                  the definition's version (lm-eval's where the task is lm-eval's)
    KIND: "choice"|"generation"   whether choices are scored or text is generated
    DATASET: str                  the name to give to `joulemark.documents.load`
    SHOTS: int                    how many solved examples stand before the question
    FILTERS: tuple[str, ...]      lm-eval's filter names, in its order: one sample line per document and filter
    PRIMARY: str                  the name in `Grade.scores` that is *the* score
    CHANCE: float | None          what guessing reaches; None where guessing has no sensible value
    GENERATION: Generation | None how to generate; None for choice tasks
    render(documents) -> list[PackItem]           on the host, once
    grade(item, outcome) -> Grade                 on the device, per item

Both functions are pure and use the standard library only. The definitions are lm-evaluation-harness's (commit 4e7e0d4,
release 0.4.13) unless the file says otherwise, so that scores can be compared; a variant gets a file and a name of its
own.
"""
