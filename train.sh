#!/usr/bin/env bash
# Trains: prepares the environment once, then runs `sana_tune train` with the flags given here.
#
#   ./train.sh --example nano             the built-in example: minutes on two CPU cores, nothing to download
#   ./train.sh                            config/config.json
#   ENV=name ./train.sh                   config/name/config.json
#   CONFIG_PATH=file.json ./train.sh      that file
#   ./train.sh --learning_rate 2e-5 …     every setting of config.json can be given as a flag
#
# TRAINING_NUM_PROCESSES=4 ./train.sh trains on four GPUs (docs/multi-gpu.md). MIXED_PRECISION is honoured where the config names none; VENV_PATH names the Python environment (else the active
# one, else .venv). config/config.env and config/$ENV/config.env are read first, as ever; they are parsed, not run.
# The exit code is the trainer's.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() {
    {
        printf 'train.sh: '
        printf '%s\n' "$@"
    } >&2
    exit 1
}

early="ENV|SIMPLETUNER_ENV|SIMPLETUNER_ENVIRONMENT|CONFIG_PATH|CONFIG_BACKEND|VENV_PATH|PYTHON|DISABLE_UPDATES"
early="$early|TRAINING_NUM_PROCESSES|TRAINING_NUM_MACHINES"

# Takes from a config.env the few variables that decide before Python runs; the trainer reads the file whole.
read_variables() {
    [ -f "$1" ] || return 0
    local line name value
    while IFS= read -r line || [ -n "$line" ]; do
        [[ $line =~ ^[[:space:]]*(export[[:space:]]+)?($early)=(.*)$ ]] || continue
        name=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]%$'\r'}
        if [[ $value =~ ^\"([^\"]*)\" || $value =~ ^\'([^\']*)\' || $value =~ ^([^[:space:]#]*) ]]; then
            value=${BASH_REMATCH[1]}
        fi
        value=${value//\$HOME/$HOME}
        export "$name=${value//\$\{HOME\}/$HOME}"
    done <"$1"
}

read_variables config/config.env
named=${SIMPLETUNER_ENVIRONMENT:-${SIMPLETUNER_ENV:-${ENV:-default}}}
[ "$named" = default ] || read_variables "config/$named/config.env"

# What can be refused at once is refused before an installation of minutes; the trainer checks all of it again.
for name in TRAINING_NUM_PROCESSES TRAINING_NUM_MACHINES; do
    number=${!name:-1}
    [[ $number =~ ^[0-9]+$ ]] || die "$name is $number; it must be a number: unset it or set it to 1"
done

config_is_named() {
    [ -z "${CONFIG_PATH:-}" ] && [ "$named" = default ] || return 0
    local flag
    for flag in "$@"; do
        case "$flag" in
            --config | --config=* | --env | --env=* | env=* | --example | --example=* | example=* | -e* | -h | --help) return 0 ;;
        esac
    done
    [ "${SIMPLETUNER_CONFIG_BACKEND:-${CONFIG_BACKEND:-${CONFIG_TYPE:-}}}" = cmd ] && return 0
    local path
    for path in config.{json,toml,yaml,yml,env} config/config.{json,toml,yaml,yml,env}; do
        [ ! -f "$path" ] || return 0
    done
    return 1
}

config_is_named "$@" || die "there is no config/config.json here ($PWD). You can" \
    "  - see it work first:      ./train.sh --example nano" \
    "  - answer a few questions: sana_tune configure   (after the first ./train.sh --example nano)" \
    "  - start from the example: cp config/config.json.example config/config.json, then edit it" \
    "  - name a config:          ./train.sh --config path/to/config.json"

bin=$("$root/scripts/setup.sh")
exec "$bin/sana_tune" train "$@"
