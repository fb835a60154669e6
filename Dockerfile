# docker build -t fastresnet .
# docker run --gpus all -v fastresnet-data:/data -v fastresnet-runs:/runs fastresnet train
#
# Debian's own Python in all stages: what is built in one runs in the other.

# PyTorch with its CUDA libraries, DALI, and FFCV, which is compiled here. It depends on pyproject.toml alone, so that a
# change of the program leaves these 6 GB as they are.
FROM debian:12.12-slim AS dependencies
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        g++ libopencv-dev libturbojpeg0-dev pkg-config python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/fastresnet
ENV PATH=/opt/fastresnet/bin:$PATH
WORKDIR /build
COPY pyproject.toml ./
RUN python3 -c 'import tomllib; \
        project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
        extras = [project["optional-dependencies"][name] for name in ("dali", "ffcv", "tensorboard")]; \
        print(*sum(extras, project["dependencies"]), sep="\n")' > requirements.txt \
    && pip install --no-cache-dir --requirement requirements.txt

FROM dependencies AS program
COPY README.md LICENSE ./
COPY fastresnet fastresnet
COPY pipelines pipelines
COPY benchmarks benchmarks
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM debian:12.12-slim
# Compilers and Python's headers: torch.compile and Triton build kernels at run time, and so does the resident pipeline
# on a CPU. Certificates are for the download of CIFAR-10. OpenCV and TurboJPEG are FFCV's; libgl1 and libglib2.0-0 belong
# to the opencv-python that it imports.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        ca-certificates g++ gcc libgl1 libglib2.0-0 libopencv-imgproc406 libpython3-dev libturbojpeg0 python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd fastresnet \
    && install -d -o fastresnet -g fastresnet /data /runs
COPY --from=dependencies /opt/fastresnet /opt/fastresnet
ENV PATH=/opt/fastresnet/bin:$PATH
COPY --from=program /wheels /tmp/wheels
RUN pip install --no-cache-dir --no-deps /tmp/wheels/*.whl

# Caches of compiled kernels lie on the volume of the runs: the second start finds them. No other folder is written but
# /tmp, so that the root may be read-only. Python does not import modules from the working folder. Another --user brings
# volumes of its own: new ones take the mode of these folders without a sticky bit, so that in folders for all users any
# of them could replace the code that another runs.
ENV FASTRESNET_DATA=/data \
    FASTRESNET_RUNS=/runs \
    XDG_CACHE_HOME=/runs/.cache \
    MPLCONFIGDIR=/runs/.cache/matplotlib \
    PYTHONSAFEPATH=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER fastresnet
WORKDIR /runs

# --build-arg DATA=cifar10 bakes the prepared data set in, for machines without a network.
ARG DATA=
RUN if [ -n "$DATA" ]; then fastresnet prepare --data "$DATA"; fi

VOLUME ["/data", "/runs"]
ENTRYPOINT ["fastresnet"]
CMD ["train"]
