#!/bin/sh
# Builds the image, starts a container with SmolLM2 and a key, and asks it for a chat and the page.
# BASE and TORCH_INDEX, if set, are arguments of the build.
set -eu
cd "$(dirname "$0")/../.."
docker version --format 'Docker {{.Server.Version}}' || { echo "make test-docker needs Docker"; exit 1; }
set --
[ -z "${BASE:-}" ] || set -- "$@" --build-arg "BASE=$BASE"
[ -z "${TORCH_INDEX:-}" ] || set -- "$@" --build-arg "TORCH_INDEX=$TORCH_INDEX"
docker build ${NETWORK:+--network "$NETWORK"} "$@" -t cats-test .

container=$(docker run -d --rm ${NETWORK:+--network "$NETWORK"} -p 127.0.0.1:8000:8000 -e CATS_API_KEY=key cats-test)
trap 'docker stop "$container" > /dev/null' EXIT
address=http://127.0.0.1:8000
for _ in $(seq 180); do
    curl --silent --fail "$address/health" > /dev/null && break
    sleep 1
done
curl --silent --show-error --fail "$address/" | grep -q '<title>CATS chat</title>'
[ "$(curl --silent -o /dev/null -w '%{http_code}' "$address/v1/models")" = 401 ]
[ "$(docker exec "$container" id -u)" = 1000 ]
curl --silent --show-error --fail "$address/v1/chat/completions" -H 'Authorization: Bearer key' \
    -H 'Content-Type: application/json' \
    -d '{"model": "smollm2", "messages": [{"role": "user", "content": "Name a pet."}], "max_tokens": 8, "temperature": 0}'
curl --silent --show-error --fail "$address/v1/models" -H 'Authorization: Bearer key' | grep -q '"smollm2:dense"'
echo
echo "the image serves"
