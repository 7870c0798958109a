"""The chat template of a model: it puts what a user writes into the form of the dialogues that the model has learned.

    python eval.py --model FOLDER --chat --prompt "Why is the sky blue?"

A template is a program in the language of Jinja, in `chat_template.jinja` or, in older folders, in
`tokenizer_config.json`. It comes with the model, so it runs in Jinja's sandbox, with what transformers gives it.
"""

import json
from datetime import datetime
from pathlib import Path

from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from support.data import read_text


class Generation(Extension):
    """{% generation %} .. {% endgeneration %} marks what a model is trained on; here it means nothing."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def refuse(message: str) -> None:
    """A template calls this where it does not like the messages."""
    raise ValueError(message)


def as_chat(folder: Path, prompt: str) -> str:
    """The prompt as the only message of a dialogue, and the beginning of the answer.

    Raises ValueError if the folder has no template, or one that does not work."""
    path, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    try:
        settings = json.loads(read_text(path)) if path.exists() else {}
        template = read_text(file) if file.exists() else settings.get("chat_template")
        if isinstance(template, list):  # several, each with a name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not template:
            raise ValueError("there is no chat_template.jinja; leave --chat out")

        # what a template may call, and the texts of special tokens, which it may write
        extensions = ["jinja2.ext.loopcontrols", Generation]
        jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        jinja.filters["tojson"] = lambda x, **more: json.dumps(x, ensure_ascii=False, **more)
        names = {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        names |= {"tools": None, "documents": None}  # as in a call without them
        tokens = {k: v for k, v in settings.items() if k.endswith("_token") and v is not None}
        names |= {k: v["content"] if isinstance(v, dict) else v for k, v in tokens.items()}
        messages = [{"role": "user", "content": prompt}]
        return jinja.from_string(template).render(messages=messages, add_generation_prompt=True, **names)
    except Exception as error:  # a template is a program
        raise ValueError(f"{folder}: no chat template that can be used ({error})") from None
