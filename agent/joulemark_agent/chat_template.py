"""Chat templates: a conversation becomes prompt text. Templates come with the model file, so they are hostile until shown otherwise.

Rendered in jinja2's immutable sandbox inside the worker process, which dies at its deadline if a template loops for ever.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from joulemark.errors import BadInput, MissingExtra


def _strftime_now(pattern: str) -> str:
    return time.strftime(pattern)


def render_template(
    template: str | None, messages: Sequence[dict[str, str]], special: Mapping[str, str], adds_bos: bool
) -> str:
    """The prompt for `messages`, with the generation prompt appended; without the BOS in front that the tokenizer `adds_bos` itself. Raises
    BadInput when there is no template or it fails."""
    if template is None:
        raise BadInput(
            "this model has no chat template", "use /v1/completions, or export the model with its chat template"
        )
    try:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        from joulemark_agent.generation_tag import GenerationTag
    except ImportError as error:
        raise MissingExtra(
            "chat templates need jinja2", "pip install jinja2 (it comes with the engines' extras)"
        ) from error

    def raise_exception(message: str) -> None:
        raise BadInput(
            f"the model's chat template refuses these messages: {message}", "change the roles or their order"
        )

    # What transformers gives to templates.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag]
    )
    try:
        compiled = environment.from_string(template)
        prompt = compiled.render(
            messages=list(messages),
            add_generation_prompt=True,
            raise_exception=raise_exception,
            strftime_now=_strftime_now,
            **special,
        )
        return prompt.removeprefix(special.get("bos_token", "")) if adds_bos else prompt
    except (TemplateError, TypeError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"the model's chat template cannot be rendered: {error}", "use /v1/completions with a prompt of your own"
        ) from error
