# The repository with its environment, for GPUs: torch from the package index brings CUDA's libraries.
#   docker build -t sft . && docker run --gpus all --ipc=host -v $PWD/outputs:/sft/outputs sft make train
FROM python:3.11-slim

# make, and a compiler: compiled layers, torchao and ZeRO's offloaded optimizer make code at run time
RUN apt-get update && apt-get install -y --no-install-recommends make gcc g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /sft

# Requirements first: this layer is made again only if they change.
COPY requirements.txt ./
RUN python -m venv .venv && .venv/bin/python -m pip install --no-cache-dir -r requirements.txt

COPY . .
RUN make setup

ENV PATH=/sft/.venv/bin:$PATH
CMD ["make", "help"]
