"""How a repository is served: the server's flags, and for administrators a launch line, compose and a proxy.

Sources: docs/customization_guide/deploy.md and docs/protocol of triton-inference-server/server.
"""

from collections.abc import Mapping, Sequence

IMAGE = "nvcr.io/nvidia/tritonserver:26.07-py3"
"""The container that `compose.yaml` and `launch.sh` name. `TRITON_IMAGE` chooses another."""
CLOSED = ("shared-memory", "model-repository", "statistics", "trace", "logging")
"""Interfaces that are answered only to whoever knows a header that is drawn at the start."""
MIN_INPUT_BYTES = 64 << 20
PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}


def input_limit(batch: int, size: int) -> int:
    """Bytes of the largest request that is taken: two full batches, and 64 MiB for large files."""
    return max(MIN_INPUT_BYTES, 2 * batch * size * size * 3)


def flags(
    repository: str, *, address: str, ports: Mapping[str, int], limit: int | None, secret: str
) -> list[str]:
    """Arguments of `tritonserver`: models fixed at the start, all ready or none, nothing from outside.

    Args:
        limit: bytes of a request; None for a server that knows no limit (before 2.60).
        secret: closes `CLOSED`; a value that nobody is told closes them for good.
    """
    found = [
        f"--model-repository={repository}",
        "--model-control-mode=none",
        "--disable-auto-complete-config",
        "--strict-readiness=true",
        "--exit-on-error=true",
        "--exit-timeout-secs=10",  # as long as a request may wait; an idle connection is waited for as well
        "--allow-cpu-metrics=false",
        "--log-info=false",
        "--log-warning=false",
        "--log-verbose=0",
    ]
    for kind, port in ports.items():
        found += [f"--{kind}-address={address}", f"--{kind}-port={port}"]
    found.append(f"--http-restricted-api={','.join(CLOSED)}:noisyssl-admin={secret}")
    found.append(f"--grpc-restricted-protocol={','.join(CLOSED)}:noisyssl-admin={secret}")
    if limit is not None:
        found.append(f"--http-max-input-size={limit}")
    return found


def files(name: str, limit: int, gpu_only: bool) -> dict[str, str]:
    """`launch.sh`, `compose.yaml`, `compose.gpu.yaml` and `proxy.conf` of a repository, by name.

    Args:
        gpu_only: a model needs a GPU, so `launch.sh` asks for one.
    """
    inside = flags(
        "/models", address="0.0.0.0", ports=PORTS, limit=limit, secret="$NOISYSSL_ADMIN_KEY"  # noqa: S104, S106
    )  # fmt: skip
    return {
        "launch.sh": _launch(inside, gpu_only),
        "compose.yaml": _compose(inside),
        "compose.gpu.yaml": COMPOSE_GPU,
        "proxy.conf": _filled(PROXY, MODELS=f"{name}(_trt|_ensemble)?", LIMIT=f"{-(-limit >> 20)}m"),
    }


def _launch(inside: Sequence[str], gpu_only: bool) -> str:
    arguments = " \\\n    ".join(f'"{flag}"' for flag in inside)
    return _filled(LAUNCH, IMAGE=IMAGE, GPUS="all" if gpu_only else "", FLAGS=arguments)


def _compose(inside: Sequence[str]) -> str:
    # compose replaces ${...} itself; :? stops where nothing is set
    key = "${NOISYSSL_ADMIN_KEY:?draw one with openssl rand -hex 32}"
    lines = "\n".join(f'      - "{flag}"' for flag in inside).replace("$NOISYSSL_ADMIN_KEY", key)
    return _filled(COMPOSE, IMAGE=IMAGE, FLAGS=lines)


def _filled(template: str, **values: str) -> str:
    for name, value in values.items():
        template = template.replace(f"@{name}@", value)
    return template


LAUNCH = """#!/bin/sh
# The hardened launch line. NOISYSSL_CACHE: folder of user 1000 that keeps engines built from the ONNX file.
# TRITON_GPUS=all gives the container the GPUs. Nobody knows the admin key: those interfaces stay closed.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
cache=${NOISYSSL_CACHE:?name a folder of user 1000, such as /var/lib/noisyssl/engines}
gpus=${TRITON_GPUS-@GPUS@}
NOISYSSL_ADMIN_KEY=${NOISYSSL_ADMIN_KEY:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')}
exec docker run --rm --init ${gpus:+--gpus "$gpus"} \\
    --read-only --cap-drop=ALL --security-opt=no-new-privileges --user=1000:1000 \\
    --pids-limit=1024 --memory="${TRITON_MEMORY:-8g}" --tmpfs=/tmp:rw,noexec,nosuid,size=256m \\
    --mount=type=bind,src="$here",dst=/models,readonly \\
    --mount=type=bind,src="$cache",dst=/var/cache/noisyssl \\
    --publish=127.0.0.1:8000:8000 --publish=127.0.0.1:8001:8001 --publish=127.0.0.1:8002:8002 \\
    "${TRITON_IMAGE:-@IMAGE@}" tritonserver \\
    @FLAGS@
"""

COMPOSE = """# Triton behind a proxy that asks every client for a certificate. On a GPU server:
#   docker compose -f compose.yaml -f compose.gpu.yaml up -d
# NOISYSSL_CACHE: folder of user 1000 for engines.
# NOISYSSL_TLS: folder with server.pem, server.key and clients.pem (who may ask).
services:
  triton:
    image: ${TRITON_IMAGE:-@IMAGE@}
    command:
      - tritonserver
@FLAGS@
    user: "1000:1000"
    read_only: true
    init: true
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
    pids_limit: 1024
    mem_limit: ${TRITON_MEMORY:-8g}
    tmpfs: ["/tmp:rw,noexec,nosuid,size=256m"]
    restart: unless-stopped
    stop_grace_period: 20s
    networks: [inside]
    volumes:
      - {type: bind, source: ., target: /models, read_only: true}
      - type: bind
        source: ${NOISYSSL_CACHE:?name a folder of user 1000, such as /var/lib/noisyssl/engines}
        target: /var/cache/noisyssl
        bind: {create_host_path: false}
    healthcheck:
      test: ["CMD", "curl", "-fsS", "http://127.0.0.1:8000/v2/health/ready"]
      interval: 10s
      timeout: 5s
      start_period: 10m
  proxy:
    image: ${PROXY_IMAGE:-nginxinc/nginx-unprivileged:stable}
    read_only: true
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
    tmpfs: ["/tmp:rw,noexec,nosuid,size=1g,mode=1777"]
    restart: unless-stopped
    depends_on: {triton: {condition: service_healthy}}
    networks: [inside, outside]
    ports: ["${PROXY_ADDRESS:-127.0.0.1}:8443:8443", "${PROXY_ADDRESS:-127.0.0.1}:8444:8444"]
    volumes:
      - {type: bind, source: ./proxy.conf, target: /etc/nginx/conf.d/default.conf, read_only: true}
      - type: bind
        source: ${NOISYSSL_TLS:?name the folder with server.pem, server.key and clients.pem}
        target: /etc/nginx/tls
        read_only: true
        bind: {create_host_path: false}
networks:
  inside: {internal: true}
  outside: {}
"""

COMPOSE_GPU = """services:
  triton:
    deploy:
      resources:
        reservations:
          devices: [{driver: nvidia, count: all, capabilities: [gpu]}]
"""

PROXY = """# nginx: mutual TLS before Triton. 8443 speaks HTTP, 8444 gRPC.
# Only inference, metadata and health pass.
limit_conn_zone $binary_remote_addr zone=clients:1m;
ssl_certificate /etc/nginx/tls/server.pem;
ssl_certificate_key /etc/nginx/tls/server.key;
ssl_client_certificate /etc/nginx/tls/clients.pem;
ssl_verify_client on;
ssl_protocols TLSv1.2 TLSv1.3;
access_log off;
server_tokens off;
client_max_body_size @LIMIT@;
client_header_timeout 10s;
client_body_timeout 30s;
limit_conn clients 64;

server {
    listen 8443 ssl;
    location = /v2/health/live { proxy_pass http://triton:8000; }
    location = /v2/health/ready { proxy_pass http://triton:8000; }
    location ~ ^/v2/models/@MODELS@(/versions/[0-9]+)?(/infer|/ready|/config)?$ {
        proxy_pass http://triton:8000;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header noisyssl-admin "";
    }
    location / { return 404; }
}

server {
    listen 8444 ssl;
    http2 on;
    location ~ ^/inference\\.GRPCInferenceService/(Server(Live|Ready)|Model(Ready|Metadata|Config|Infer))$ {
        grpc_pass grpc://triton:8001;
        grpc_set_header noisyssl-admin "";
    }
    location / { return 404; }
}
"""
