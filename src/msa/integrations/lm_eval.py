"""The model `msa` of lm-evaluation-harness; needs the package `lm-eval` (extra `harness`).

The harness writes long contexts into its prompts. Here each becomes a memory bank that is made for
it and thrown away: the question at the prompt's end is asked of it as users ask. What is only
scored (multiple choice, perplexity) is scored by the plain backbone, without a memory, within its
positions.

    python -m msa.integrations.lm_eval run --model msa --model_args pretrained=worlds \
        --tasks niah_single_1
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from msa.errors import InputError
from msa.evaluation.reader import TextReader
from msa.inference.engine import MemoryEngine
from msa.integrations.prompt_splitting import SplitPrompt, split_prompt
from msa.memory.bank import MemoryBank
from msa.model.loading import load
from msa.text.prompts import PromptEncoder
from msa.types import Document

PART_TOKENS = 256
_KNOWN = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_p"})
_log = logging.getLogger(__name__)


@register_model("msa")
class MSAHarnessModel(TemplateLM):
    """A checkpoint as the harness asks it.

    Args:
        pretrained: name, folder or Hub id of the checkpoint; by default the default model.
        device: where it runs; on the CPU where there is no GPU, which the harness asks for.
        dtype: what it runs in; by default as `msa.load` chooses.
        batch_size: questions of one context that are asked together.
        max_batch_size: not looked at.
        part_tokens: a context is split into documents of at most so many tokens.
        split: regular expression that takes prompts apart, see
            `msa.integrations.prompt_splitting.split_prompt`.
        **options: fields of `msa.inference.options.AskOptions`, such as `lexical_weight=0`.

    Raises:
        ModelError, FetchError: the checkpoint cannot be loaded.
        ConfigError: there is no such option.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        part_tokens: int = PART_TOKENS,
        split: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            _log.warning("msa: there is no GPU, %s; running on the CPU", device)
            device = None
        self._checkpoint = load(pretrained, device=device or "cpu", dtype=dtype)
        self.tokenizer = self._checkpoint.tokenizer
        self._device = self._checkpoint.model.device
        self._encoder = PromptEncoder(self.tokenizer, self._checkpoint.template)
        self._part_tokens = int(part_tokens)
        self._split = split
        batch = batch_size if isinstance(batch_size, int) else batch_size.partition(":")[0]
        if str(batch).isdecimal():
            options.setdefault("batch_size", int(batch))
        self._options = self._checkpoint.ask_options.with_changes(**options)

    @property
    def eot_token_id(self) -> int:
        """What stands in front of a text that is scored without a context."""
        for token in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
            if token is not None:
                return int(token)
        raise InputError("the tokenizer has no token of its own that a text could begin with")

    @property
    def max_length(self) -> int:
        """Positions of the backbone."""
        return int(self._checkpoint.model.config.max_position_embeddings)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; what reads like a control token is text."""
        return self._encoder.plain(string)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to every prompt, from a bank of its own context.

        Prompts with one context share a bank. A prompt that is a question only is answered by the
        reader, without a memory.
        """
        answers: dict[int, str] = {}
        groups: dict[tuple[str, str], list[int]] = {}
        parts: list[SplitPrompt] = []
        for i, request in enumerate(requests):
            prompt, settings = request.args
            parts.append(split_prompt(prompt, self._split))
            groups.setdefault((parts[-1].context, repr(settings)), []).append(i)
        unknown = {key for r in requests for key in r.args[1]} - _KNOWN
        if unknown:
            _log.warning("msa: not looked at: %s", ", ".join(sorted(unknown)))
        without = sum(not part.context for part in parts)
        if without:
            _log.warning("msa: %d prompts are questions only, asked without a memory", without)
        for (context, _), rows in tqdm(groups.items(), desc="Asking", disable=disable_tqdm):
            settings = requests[rows[0]].args[1]
            questions = [parts[i].question for i in rows]
            found = self._ask(context, questions, settings)
            for i, text in zip(rows, found, strict=True):
                answers[i] = _cut(text, settings.get("until"))
                self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return [answers[i] for i in range(len(requests))]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts by the plain backbone, in windows of its positions."""
        found = []
        for request in tqdm(requests, desc="Scoring", disable=disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, 1
            )
            pairs = [make_disjoint_window(window) for window in windows]
            found.append(sum(self._likelihood(*pair)[0] for pair in pairs))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        found = []
        cut = sum(len(context) + len(more) > self.max_length + 1 for _, context, more in requests)
        if cut:
            _log.warning(
                "msa: scored without a memory, and %d of %d contexts are longer than the %d "
                "positions of the backbone: only their ends were read",
                cut,
                len(requests),
                self.max_length,
            )
        for pair, context, continuation in tqdm(requests, desc="Scoring", disable=disable_tqdm):
            found.append(self._likelihood(context, continuation))
            self.cache_hook.add_partial("loglikelihood", pair, found[-1])
        return found

    def _ask(self, context: str, questions: list[str], settings: Mapping[str, Any]) -> list[str]:
        options = self._options.with_changes(**_ask_options(settings))
        if not context:
            reader = TextReader(self._checkpoint, max_new_tokens=options.max_new_tokens)
            nothing: list[list[tuple[int, Document]]] = [[] for _ in questions]
            return [answer.text for answer in reader.answer(questions, nothing)]
        with tempfile.TemporaryDirectory(prefix="msa-harness-") as folder:
            path = Path(folder, "bank")
            with MemoryBank.create(
                path, self._checkpoint, max_document_tokens=self._part_tokens
            ) as bank:
                bank.add([Document("prompt", context)])
                engine = MemoryEngine(bank, options=options)
                try:
                    return [answer.text for answer in engine.ask(questions)]
                finally:
                    engine.close()

    @torch.no_grad()
    def _likelihood(
        self, context: Sequence[int], continuation: Sequence[int]
    ) -> tuple[float, bool]:
        """Log-probability of a continuation, and whether it is the likeliest at every step."""
        if len(continuation) > self.max_length:
            raise InputError(
                f"a continuation of {len(continuation)} tokens is to be scored; this model has "
                f"{self.max_length} positions"
            )
        ids = [*context, *continuation][-(self.max_length + 1) :]
        wanted = torch.tensor(list(continuation), device=self._device)
        out = self._checkpoint.model(
            torch.tensor([ids[:-1]], device=self._device),
            logits_to_keep=len(continuation),
            use_cache=False,
        )
        logits = out.logits[0].float().log_softmax(-1)  # [continuation, vocabulary]
        score = logits.gather(-1, wanted[:, None]).sum()
        return float(score), bool((logits.argmax(-1) == wanted).all())


def _ask_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A task's settings of generation as options of asking."""
    changes: dict[str, Any] = {}
    if "max_gen_toks" in settings:
        changes["max_new_tokens"] = int(settings["max_gen_toks"])
    if settings.get("do_sample"):
        changes["temperature"] = float(settings.get("temperature", 1.0))
        changes["top_p"] = float(settings.get("top_p", 1.0))
    return changes


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the stop sequences."""
    for stop in [until] if isinstance(until, str) else until or ():
        if stop:
            text = text.partition(stop)[0]
    return text


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
