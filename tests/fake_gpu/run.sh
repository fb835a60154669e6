#!/usr/bin/env bash
# run.sh PYTHON ARGUMENTS...: runs Python with a simulated H100 (see README.md). What is built for it and the caches of
# compilers lie in $FAKE_GPU_BUILD, else in a folder for temporary files.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=$(realpath -s "$(command -v "$1")")
shift
build=${FAKE_GPU_BUILD:-${TMPDIR:-/tmp}/fake-gpu-$("$python" -c 'import torch; print(torch.__version__)')}
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

mkdir -p "$build"
headers=(-isystem "$packages/nvidia/cu13/include" -isystem "$packages/triton/backends/nvidia/include")
g++ -O1 -fPIC -shared "${headers[@]}" -o "$build/libfakecuda.so" "$here/runtime.cpp" "$here/libraries.cpp" -ldl
g++ -O1 -fPIC -shared -o "$build/libcuda.so.1" "$here/driver.cpp" -Wl,--unresolved-symbols=ignore-all

# PyTorch finds those of CUDA's own libraries that are not stood in for by path.
LD_LIBRARY_PATH=$build$(printf ':%s' "$packages"/nvidia/*/lib)
PYTHONPATH=$here:$PWD${PYTHONPATH:+:$PYTHONPATH}
export LD_LIBRARY_PATH PYTHONPATH TRITON_LIBCUDA_PATH=$build CUDA_MODULE_LOADING=LAZY OMP_NUM_THREADS=1
export TORCHINDUCTOR_CACHE_DIR=$build/inductor TRITON_CACHE_DIR=$build/triton TORCHINDUCTOR_COMPILE_THREADS=1
LD_PRELOAD=$build/libfakecuda.so exec "$python" "$@"
