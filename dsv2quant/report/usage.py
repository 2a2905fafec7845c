"""How an artifact is got and run, as a card tells it: exact commands for each consumer that it is for.

Options are those of vLLM 0.33 (engine/arg_utils.py, entrypoints/llm.py), SGLang 0.5.23 (server_args.py), transformers
5.23, huggingface_hub 2.4 and llama.cpp 0c1e57098 (common/arg.cpp, common/download.cpp). Commands name the repository as
storage/card.py has it.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsv2quant.formats.schemes import CODECS
from dsv2quant.planning.plan import Plan
from dsv2quant.planning.rules import NEEDS
from dsv2quant.planning.sizes import tensor_parallel_sizes
from dsv2quant.storage.card import REPO
from dsv2quant.storage.manifest import gguf_stem

_TITLES = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers", "llama.cpp": "llama.cpp"}
_PORTS = {"vllm": 8000, "sglang": 30000, "llama.cpp": 8080}
_QUESTION, _BEGINNING = "What is attention in a language model?", "An attention function can be described as"
_CHAT = f'messages = [{{"role": "user", "content": "{_QUESTION}"}}]'
_LLM = """\
from vllm import LLM

if __name__ == "__main__":  # vLLM's processes import this file
    llm = LLM({arguments})
    sampling = llm.get_default_sampling_params()
    sampling.max_tokens = 256
    {call}"""
_CLIENT = """\
from openai import OpenAI

client = OpenAI(base_url="http://localhost:{port}/v1", api_key="none")
model = client.models.list().data[0].id
{call}"""
_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{model}")
model = AutoModelForCausalLM.from_pretrained("{model}", dtype="bfloat16", device_map="auto")
{inputs}
output = model.generate(**inputs.to(model.device), max_new_tokens=256)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""
# Of models with a chat template, and without.
_LLM_CALLS = {
    True: f"{_CHAT}\n    print(llm.chat(messages, sampling)[0].outputs[0].text)",
    False: f'print(llm.generate("{_BEGINNING}", sampling)[0].outputs[0].text)',
}
_CLIENT_CALLS = {
    True: f"{_CHAT}\nanswer = client.chat.completions.create(model=model, messages=messages, max_tokens=256)\n"
    "print(answer.choices[0].message.content)",
    False: f'answer = client.completions.create(model=model, prompt="{_BEGINNING}", max_tokens=256)\n'
    "print(answer.choices[0].text)",
}
_INPUTS = {
    True: f"{_CHAT}\ninputs = tokenizer.apply_chat_template(\n"
    '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)',
    False: f'inputs = tokenizer("{_BEGINNING}", return_tensors="pt")',
}
# What transformers loads a layout with (quantizers/auto.py).
_PACKAGES = {"fp8": "accelerate", "compressed-tensors": "accelerate compressed-tensors"}
_OTHER_PACKAGES = "accelerate optimum gptqmodel"  # GPTQ's and AWQ's


def usage(plan: Plan, *, chats: bool) -> list[str]:
    """Sections of Markdown for the consumers of a plan's artifact; `chats` says whether it has a chat template."""
    where = f"`hf download {REPO} --local-dir DIR` gets the files; DIR may then stand for `{REPO}` in what follows."
    sections, servers = [where], [target for target in plan.targets if target in _PORTS]
    for target in plan.targets:
        if target == "transformers":
            if plan.checkpoint.whole is None:  # which class loads a model that sees depends on the model
                sections.append(_transformers(plan, chats))
        else:
            sections.append(_engine(plan, target, chats))
    return [*sections, *([_client(servers, chats)] if servers else [])]


def _engine(plan: Plan, target: str, chats: bool) -> str:
    tp, ep = plan.parallel.tp, plan.parallel.ep
    if target == "vllm":
        option, words = "--tensor-parallel-size", [f"vllm serve {REPO}"]
        words += [f"{option} {tp}"] * (tp > 1) + [f"--data-parallel-size {ep // tp}"] * (ep > tp)
        words += ["--enable-expert-parallel"] * (ep > 1)
    else:  # its tensor-parallel size counts all GPUs, over which attention may be repeated
        option, words = "--tp-size", [f"python -m sglang.launch_server --model-path {REPO}"]
        words += [f"{option} {max(tp, ep)}"] * (max(tp, ep) > 1) + [f"--ep-size {ep}"] * (ep > 1)
        words += [f"--dp-size {ep // tp} --enable-dp-attention"] * (ep > tp)
    sizes = tensor_parallel_sizes(plan, target)
    lines = [_block("bash", " ".join(words))]
    if sizes:
        lines.append(f"It can be split over {_either(sizes)} by `{option}`.")
    lines += [f"{s} needs {need}." for (t, s), need in NEEDS.items() if t == target and s in plan.schemes]
    if target == "vllm" and ep <= tp:  # one process of Python has no data parallelism
        arguments = [
            f'"{REPO}"',
            *[f"tensor_parallel_size={tp}"] * (tp > 1),
            *["enable_expert_parallel=True"] * (ep > 1),
        ]
        script = _LLM.format(arguments=", ".join(arguments), call=_LLM_CALLS[chats])
        lines += ["Without a server:", _block("python", script)]
    return "\n\n".join([f"### {_TITLES[target]}", *lines])


def _either(sizes: Sequence[int]) -> str:
    """'1, 2 or 4 GPUs'."""
    *most, last = map(str, sizes)
    return f"{', '.join(most)}{' or ' * bool(most)}{last} GPU{'s' * (sizes[-1] > 1)}"


def _transformers(plan: Plan, chats: bool) -> str:
    layouts = {str(CODECS[scheme].quant_method) for scheme in plan.schemes}
    packages = sorted({p for x in layouts for p in _PACKAGES.get(x, _OTHER_PACKAGES).split()})
    install = _block("bash", f"pip install transformers {' '.join(packages)}")
    script = _TRANSFORMERS.format(model=REPO, inputs=_INPUTS[chats])
    return "\n\n".join(["### transformers", install, _block("python", script)])


def _client(servers: Sequence[str], chats: bool) -> str:
    """How any of the servers is asked."""
    first, *others = servers
    ports = "".join(f", {_TITLES[other]} at {_PORTS[other]}" for other in others)
    script = _CLIENT.format(port=_PORTS[first], call=_CLIENT_CALLS[chats])
    said = f"The server speaks OpenAI's API: {_TITLES[first]} at port {_PORTS[first]}{ports}."
    return "\n\n".join(["### A client", said, _block("python", script)])


def llama_cpp(files: Sequence[Sequence[str]], *, chats: bool, experts: bool) -> list[str]:
    """Sections for llama.cpp, of the names of each artifact's files; `experts` says whether the model routes."""
    first = files[0][0]
    asked = f"llama-cli -m {first}" if chats else f'llama-completion -m {first} -p "{_BEGINNING}" -n 256'
    commands = [_download(names) for names in files]
    served = [f"llama-server -m {first}", *[f"llama-server -m {first} --cpu-moe"] * experts, asked]
    # Its `:Q4_K_M` takes the first file whose name ends so, of whatever it is a part.
    straight = [f"llama-server -hf {REPO} --hf-file {names[0]}" for names in files]
    section = ["### llama.cpp", _block("bash", "\n".join(commands)), _block("bash", "\n".join(served))]
    if experts:
        section.append("`--cpu-moe` leaves the routed experts in main memory, where GPUs have not enough.")
    section += ["Downloaded by llama.cpp itself:", _block("bash", "\n".join(straight))]
    return ["\n\n".join(section), _client(["llama.cpp"], chats)]


def _download(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"hf download {REPO} {names[0]} --local-dir ."
    return f'hf download {REPO} --include "{gguf_stem(names[0])}-*-of-*.gguf" --local-dir .'


def _block(language: str, code: str) -> str:
    return f"```{language}\n{code}\n```"
