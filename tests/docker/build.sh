#!/usr/bin/env bash
# Build images without access to a container registry: on a stand-in base made from Debian packages, with this machine's
# certificates and pip settings. Usage: build.sh IMAGE…
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH=/usr/bin:$PATH # Debian's docker client, which needs no plug-in for BuildKit
base=sparse-distill/base:bookworm
flags="--network=host --build-arg BASE_IMAGE=$base --build-arg CUDA_BASE_IMAGE=$base"
scratch=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$scratch"' EXIT

if ! docker image inspect $base >/dev/null 2>&1; then
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$scratch/root" >"$scratch/log" \
        || { cat "$scratch/log" >&2; exit 1; }
    cp /etc/ssl/certs/ca-certificates.crt "$scratch/root/etc/ssl/certs/"
    printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\ntimeout = 180\n' >"$scratch/root/etc/pip.conf"
    tar --create --directory "$scratch/root" --exclude './var/cache/apt/*' --exclude './var/lib/apt/lists/*' . \
        | docker import - $base >/dev/null
fi

if [ -d "${PIP_FIND_LINKS:-}" ]; then # this folder has torch for the CPU: serve it as a package index
    port=8790 # fixed, because pip's arguments are part of BuildKit's cache key
    mkdir "$scratch/index"
    ln -s "$PIP_FIND_LINKS" "$scratch/index/torch"
    python3 -m http.server --bind 127.0.0.1 --directory "$scratch/index" $port >/dev/null 2>&1 &
    until (echo >/dev/tcp/127.0.0.1/$port) 2>/dev/null; do kill -0 $!; sleep 0.1; done
    flags+=" --build-arg PIP_EXTRA_INDEX_URL=http://127.0.0.1:$port/"
fi

make images IMAGES="$*" DOCKER_FLAGS="$flags"
