#!/usr/bin/env bash
# Packs SGLang, Mooncake and what both import for a GPU machine without a network: Python 3.12, torch 2.11 for CUDA 13,
# H100. OUT/site.tar.xz is some 50 MB; there, `tar -xJf site.tar.xz -C DIR` and PYTHONPATH=DIR.
# Kernels come for sm_90 alone, Mooncake without its store, and stand-ins for flashinfer, which SGLang imports by name.
set -euo pipefail

out=${1:?usage: $0 OUT}
here=$(cd "$(dirname "$0")" && pwd)
root=$here/../../..
mkdir -p "$out/wheels"
rm -rf "$out/site"
mkdir "$out/site"

platforms=()
for glibc in 39 38 36 35 34 31 28 27 26 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
download() {
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --python-version 3.12 \
        --implementation cp "${platforms[@]}" --dest "$out/wheels" "$@" 2> >(grep -v 'is ignored: it is neither' >&2)
}

# Of SGLang's list, what that machine has not got already; then what Hotspare imports; then the kernels and Mooncake.
grep -vE '^#|^(triton|pillow|sentencepiece|einops|uvloop)=' "$root/tests/sglang/requirements.txt" >"$out/wanted.txt"
grep -E '^(annotated-doc|annotated-types|fastapi|httpcore2|httpx2|opentelemetry-api|orjson|posix_ipc|prometheus_client|pydantic|pydantic_core|starlette|truststore|typer|typing-inspection|uvicorn|xxhash)==' \
    "$root/constraints.txt" >>"$out/wanted.txt"
echo 'sglang-kernel==0.4.5' >>"$out/wanted.txt" # the last whose library loads beside torch 2.11
echo 'mooncake-transfer-engine-cuda13==0.3.14' >>"$out/wanted.txt"
download --requirement "$out/wanted.txt"

for wheel in "$out"/wheels/*.whl; do
    case $wheel in
    */sglang_kernel-*) unzip -qo "$wheel" -x '*/flash_ops*' '*/flashmla_ops*' '*/infllm_ops*' '*/sm100/*' -d "$out/site" ;;
    */sglang-*) unzip -qo "$wheel" -x '*/_server.*.so' '*/_bench.*.so' 'sglang/multimodal_gen/*' -d "$out/site" ;;
    */mooncake_*)
        unzip -qo "$wheel" 'mooncake/*.py' mooncake/engine.so mooncake/libasio.so mooncake/libetcd_wrapper.so \
            '*.libs/libyaml*' '*.libs/libjsoncpp*' '*.libs/libglog*' '*.libs/libgflags*' '*.libs/libunwind*' '*.dist-info/*' \
            -d "$out/site"
        ;;
    *) unzip -qo "$wheel" -d "$out/site" ;;
    esac
done

sed -i 's/_has_flashinfer = True/_has_flashinfer = False/' "$out"/site/sgl_kernel/{elementwise,sampling}.py
cp -r "$here/gpu_stubs/." "$out/site"
mkdir "$out/site/hotspare-0.1.0.dist-info" # its code is the checkout; SGLang looks for its entry point here
printf 'Metadata-Version: 2.1\nName: hotspare\nVersion: 0.1.0\n' >"$out/site/hotspare-0.1.0.dist-info/METADATA"
printf '[sglang.srt.plugins]\nhotspare = transfer.sglang.plugin:register\n' \
    >"$out/site/hotspare-0.1.0.dist-info/entry_points.txt"
find "$out/site" -name __pycache__ -prune -exec rm -rf {} +
tar -C "$out/site" -c . | xz -T2 -3 >"$out/site.tar.xz"
du -h "$out/site.tar.xz"
