# Sourced by run.sh and test.sh from the repository's root.

# ensure_venv EXTRAS: make .venv when there is none and install what pyproject.toml asks for (EXTRAS as in "[dev]"), with the
# versions of constraints.txt. Quick when nothing changed since the last time.
ensure_venv() {
    local extras="${1:-}" python="" candidate stamp wanted more=()
    for candidate in "${MANTA_PYTHON:-}" python3.11 python3.12 python3.13 python3; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            python="$candidate"
            break
        fi
    done
    if [ ! -x .venv/bin/python ]; then
        if [ -z "$python" ]; then
            echo "manta: no Python 3.11 to 3.13 with venv found; install one, or name it in MANTA_PYTHON" >&2
            return 1
        fi
        echo "manta: making .venv with $("$python" --version)" >&2
        "$python" -m venv .venv
    fi
    stamp=".venv/manta-installed$extras"
    wanted="$(cat pyproject.toml constraints.txt scripts/venv.sh | cksum)"
    for candidate in "$stamp" ".venv/manta-installed[dev]"; do # what the tests need includes what serving needs
        if [ "$(cat "$candidate" 2>/dev/null)" = "$wanted" ]; then
            return 0
        fi
    done
    echo "manta: installing into .venv (several hundred MB the first time)" >&2
    # torch on its own and first: this exact requirement is what picks a CPU wheel where one is offered.
    .venv/bin/python -m pip install --disable-pip-version-check "torch==2.13.0" >&2
    # A CUDA build of torch brought its triton along; the tests of kernels want one beside the CPU build too.
    if [ "$extras" = "[dev]" ] && ! .venv/bin/python -c 'import triton' 2>/dev/null; then
        more=("triton==3.9.0")
    fi
    .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e ".$extras" "${more[@]}" >&2
    if [ "$extras" = "[dev]" ]; then
        # The client of Text Generation Inference asks for an older huggingface-hub than transformers does; it runs with ours.
        .venv/bin/python -m pip install --disable-pip-version-check --no-deps "text-generation==0.7.0" >&2
    fi
    echo "$wanted" >"$stamp"
}
