"""How an artifact is run, as a card tells it: a section with the exact command for each consumer that it is for.

Options are those of vLLM 0.33 (engine/arg_utils.py), SGLang 0.5.23 (server_args.py), transformers 5.23 and llama.cpp
0c1e57098 (common/arg.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence

from dsv2quant.formats.schemes import CODECS
from dsv2quant.planning.plan import Plan
from dsv2quant.planning.rules import NEEDS
from dsv2quant.planning.sizes import tensor_parallel_sizes

HERE = "."  # what commands name where the repository has no id yet: they are then for its folder
_TITLES = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers"}
_PYTHON = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{model}")
model = AutoModelForCausalLM.from_pretrained("{model}", dtype="bfloat16", device_map="auto")
inputs = tokenizer("An attention function can be described as", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))"""
# What transformers loads a layout with (quantizers/auto.py).
_PACKAGES = {"fp8": "accelerate", "compressed-tensors": "accelerate compressed-tensors"}
_OTHER_PACKAGES = "accelerate optimum gptqmodel"  # GPTQ's and AWQ's


def usage(plan: Plan, repo: str | None) -> list[str]:
    """A section of Markdown for each consumer of a plan's artifact, which lies in `repo` on the hub."""
    model = repo or HERE
    sections = []
    for target in plan.targets:
        if target == "transformers":
            if plan.checkpoint.whole is None:  # which class loads a model that sees depends on the model
                sections.append(_transformers(plan, model))
        else:
            sections.append(_engine(plan, target, model))
    return sections


def _engine(plan: Plan, target: str, model: str) -> str:
    tp, ep = plan.parallel.tp, plan.parallel.ep
    if target == "vllm":
        option, words = "--tensor-parallel-size", [f"vllm serve {model}"]
        words += [f"{option} {tp}"] * (tp > 1) + [f"--data-parallel-size {ep // tp}"] * (ep > tp)
        words += ["--enable-expert-parallel"] * (ep > 1)
    else:  # its tensor-parallel size counts all GPUs, over which attention may be repeated
        option, words = "--tp-size", [f"python -m sglang.launch_server --model-path {model}"]
        words += [f"{option} {max(tp, ep)}"] * (max(tp, ep) > 1) + [f"--ep-size {ep}"] * (ep > 1)
        words += [f"--dp-size {ep // tp} --enable-dp-attention"] * (ep > tp)
    sizes = tensor_parallel_sizes(plan, target)
    lines = [_block("bash", " ".join(words))]
    if sizes:
        lines.append(f"It can be split over {_either(sizes)} by `{option}`.")
    lines += [f"{s} needs {need}." for (t, s), need in NEEDS.items() if t == target and s in plan.schemes]
    return "\n\n".join([f"### {_TITLES[target]}", *lines])


def _either(sizes: Sequence[int]) -> str:
    """'1, 2 or 4 GPUs'."""
    *most, last = map(str, sizes)
    return f"{', '.join(most)}{' or ' * bool(most)}{last} GPU{'s' * (sizes[-1] > 1)}"


def _transformers(plan: Plan, model: str) -> str:
    layouts = {str(CODECS[scheme].quant_method) for scheme in plan.schemes}
    packages = sorted({p for x in layouts for p in _PACKAGES.get(x, _OTHER_PACKAGES).split()})
    install = _block("bash", f"pip install transformers {' '.join(packages)}")
    return "\n\n".join(["### transformers", install, _block("python", _PYTHON.format(model=model))])


def llama_cpp(files: Sequence[tuple[str, str]], repo: str | None) -> str:
    """The section for llama.cpp, of (file type, its first file)."""
    _, file = files[0]
    lines = [f"llama-server -m {file}", f'llama-cli -m {file} -p "An attention function can be described as" -n 64']
    if repo is not None:
        lines += [f"llama-server -hf {repo}:{kind}" for kind, _ in files]
    return "\n\n".join(["### llama.cpp", _block("bash", "\n".join(lines))])


def _block(language: str, code: str) -> str:
    return f"```{language}\n{code}\n```"
