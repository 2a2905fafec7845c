"""lm-evaluation-harness over this tool's runtime: any checkpoint, artifact or GGUF file as lm_eval's model `dsv2quant`.

`python -m dsv2quant.lm_eval` is the command `lm_eval`, which looks for no models beyond its own, with this one added.
Tokens, windows and ends are those of its model `hf` (lm_eval 0.4.13, lm_eval/models/huggingface.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lm_eval.models  # noqa: F401 - registers lm_eval's own, which it leaves out where another came first
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from dsv2quant import api
from dsv2quant.errors import InputError, UsageError
from dsv2quant.evaluation.divergence import TOKENS_TOGETHER, run
from dsv2quant.model.completion import Sampling, generate, open_model
from dsv2quant.model.load import load_options
from dsv2quant.progress import Progress, no_progress
from dsv2quant.text.chat import Chat
from dsv2quant.text.tokenizer import Detokenizer

MOST_NEW = 256  # tokens, where a task doesn't say: as `hf`
Encoded = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, tokens of the context, of the continuation


@contextmanager
def bars(total: int, unit: str, label: str) -> Iterator[Callable[[int], object]]:
    """Progress as lm_eval shows its own."""
    with tqdm(total=total, desc=label) as bar:
        yield bar.update


@register_model("dsv2quant")
class Dsv2quantLM(TemplateLM):
    """`pretrained` is what `dsv2quant.open` takes; `dtype`, `backend` and `device` are `evaluate`'s. `batch_size` are
    the requests of a batch, "auto" as many as have 4096 tokens; `max_length` is the model's context where it is None.
    `progress` is told of requests. Without a GPU it computes on the CPU, whatever `device` says, as `hf` does.

    Raises InputError for what is no language model, and UsageError for options that can't be had.
    """

    def __init__(
        self, pretrained: api.Model, dtype: str = "auto", backend: str = "auto", max_length: int | None = None,
        batch_size: int | str = "auto", max_batch_size: int | None = None, device: str | None = None,
        progress: Progress = bars,
    ) -> None:  # fmt: skip
        super().__init__()
        self.checkpoint, self._progress = api.open(pretrained), progress
        if self.checkpoint.config.is_classifier:
            fix = "lm_eval needs a language model"
            raise InputError(f"is a {self.checkpoint.config.architecture}", where=self.checkpoint.model, fix=fix)
        self._tokenizer = self.checkpoint.tokenizer()
        self._stop = self.checkpoint.stop_ids(self._tokenizer)
        self._batch = None if str(batch_size).startswith("auto") else int(batch_size)
        self._most = max_batch_size
        self.max_length = max_length or self.checkpoint.config.max_position_embeddings
        chosen = device if device is not None and torch.cuda.is_available() else "cpu"  # unasked, lm_eval says cuda:0
        self.model = open_model(self.checkpoint, load_options(chosen, dtype, backend, "auto"))
        self._device = torch.device(chosen)

    @property
    def eot_token_id(self) -> int:
        return min(self._stop, default=self._tokenizer.bos_id)

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.checkpoint.model.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text, control tokens that it spells out among them; BOS first as the tokenizer says, where the
        text doesn't spell it out."""
        ids = self._tokenizer.encode(string, parse_special=True)
        self._tokenizer.check_ids(ids, self.checkpoint.config.vocab_size)
        begun = ids[:1].tolist() == [self._tokenizer.bos_id]
        wanted = self._tokenizer.add_bos and not begun if add_special_tokens is None else add_special_tokens
        return [*[self._tokenizer.bos_id] * wanted, *ids.tolist()]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[Encoded] = []
        owners = []
        for owner, (text,) in enumerate(request.args for request in requests):
            cut = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            found: list[Encoded] = [(None, *make_disjoint_window(window)) for window in cut]
            windows += found
            owners += [owner] * len(found)
        sums = [0.0] * len(requests)
        for owner, (logp, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[owner] += logp
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """ln p of each continuation behind its context, and whether it is what is likeliest at each place. What is too
        long is cut from the left."""
        rows = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in requests]
        answers = [(0.0, False)] * len(requests)
        with self._shown(disable_tqdm)(len(rows), "", "loglikelihood") as advance:
            for batch in self._batches([len(row) - 1 for row in rows]):
                padded = np.zeros((len(batch), len(rows[batch[0]]) - 1), np.int64)  # behind: no token sees it
                for place, index in enumerate(batch):
                    padded[place, : len(rows[index]) - 1] = rows[index][:-1]
                passed = run(self.model, padded, [slice(0, len(batch))])
                for place, index in enumerate(batch):
                    texts, _, continuation = requests[index]
                    last = len(rows[index]) - 1
                    states = passed.hidden[place, last - len(continuation) : last]
                    logp = self.model.ends.logits(states).double().log_softmax(-1)
                    wanted = torch.tensor(continuation, device=logp.device)
                    total = float(logp.gather(1, wanted[:, None]).sum())
                    answers[index] = total, bool((logp.argmax(1) == wanted).all())
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answers[index])
                advance(len(batch))
        return answers

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of requests that go together, the longest first."""
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        while order:
            count = self._batch or max(1, TOKENS_TOGETHER // lengths[order[0]])
            count = min(count, self._most or count)
            yield order[:count]
            order = order[count:]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        found = []
        with self._shown(disable_tqdm)(len(requests), "", "generate_until") as advance:
            for text, asked in (request.args for request in requests):
                found.append(self._generate(text, asked))
                self.cache_hook.add_partial("generate_until", (text, asked), found[-1])
                advance(1)
        return found

    def _shown(self, disabled: bool) -> Progress:
        return no_progress if disabled else self._progress

    def _generate(self, text: str, asked: dict[str, Any]) -> str:
        options: dict[str, Any] = dict(normalize_gen_kwargs(asked, MOST_NEW))
        until, count = options.pop("until"), options.pop("max_gen_toks")
        temperature, top_p = options.pop("temperature", 1.0), options.pop("top_p", 1.0)
        sampling = Sampling(temperature, top_p) if options.pop("do_sample") else Sampling()
        if options:
            raise UsageError(f"generation by {', '.join(options)} can't be had", fix="temperature and top_p can")
        if count >= self.max_length:
            raise UsageError(f"max_gen_toks {count} leaves no context of {self.max_length}", fix="ask for fewer")
        prompt = self.tok_encode(text)[count - self.max_length :]
        detokenizer, made = Detokenizer(self._tokenizer), ""
        for token in generate(self.model, prompt, stop=self._stop, max_new_tokens=count, sampling=sampling):
            made += "" if token in self._stop else detokenizer.add(token)
            if any(end and end in made for end in until):
                break
        else:
            made += detokenizer.end()
        return str(postprocess_generated_text(made, until, None))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt that the checkpoint's chat template spells. Raises UsageError for an answer that is to be
        continued: templates close it."""
        if not add_generation_prompt:
            raise UsageError("an answer's beginning (gen_prefix) can't be had with a chat template")
        chat = Chat(chat_history, self.checkpoint.model)
        (text,) = self.checkpoint.templates().render([chat], generation_prompt=True)
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, for lm_eval's records."""
        return self.checkpoint.templates().named.get("default") if chat_template else None


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
