#!/bin/sh
# Entry point of both images.
#   calibrate MODEL …  writes $COR_SCORES, unless it is there
#   serve MODEL …      serves with $COR_SCORES
#   health             succeeds when the server in this container answers
#   anything else      is run as it is
set -eu

fail() {
    echo "cor-entrypoint: $*" >&2
    exit 1
}

# A secret goes from its file into this process's environment: it is in no argument (`ps`), in no compose file
# and not in `docker inspect`.
secret() { # VARIABLE FILE
    [ -e "$2" ] || return 0
    [ -r "$2" ] || fail "$2 cannot be read by user $(id -u): give its file to that user (docs/howto/docker.md)"
    value=$(cat "$2")
    [ -z "$value" ] || export "$1=$value"
}

secrets=${COR_SECRETS:-/run/secrets}
secret HF_TOKEN "$secrets/hf_token"
secret VLLM_API_KEY "$secrets/api_key"

case ${1:-} in
calibrate)
    # The file appears in one step when the calibration is done, so one that is there is complete.
    if [ -e "$COR_SCORES" ]; then
        echo "cor-entrypoint: $COR_SCORES is there, nothing to do; delete it to calibrate again"
        exit 0
    fi
    exec cor-vllm "$@" --output "$COR_SCORES"
    ;;
serve)
    if [ -e "$secrets/api_key" ] && [ -z "${VLLM_API_KEY:-}" ]; then
        fail "$secrets/api_key is empty: the server would answer everyone"
    fi
    exec vllm "$@" --cor-scores "$COR_SCORES"
    ;;
health)
    exec python3 -c 'from urllib.request import urlopen; urlopen("http://127.0.0.1:8000/health", timeout=5)'
    ;;
*)
    exec "$@"
    ;;
esac
