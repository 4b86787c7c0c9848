# Source this (bash) after dev/setup: exports FARSHORE_MONGOD, FARSHORE_MONGOD_LIBRARY_PATH (for mongod only, when
# it needs libraries from the cache), LIBCLANG_PATH (when the system has no libclang) and BINDGEN_EXTRA_CLANG_ARGS (when
# libclang lacks its own headers).
# shellcheck source=dev/paths.sh
. "$(dirname "${BASH_SOURCE[0]}")/paths.sh"
if [ -f "$farshore_stamp" ]; then
    # shellcheck disable=SC1090
    . "$farshore_stamp"
else
    echo "env.sh: nothing set up yet: run dev/setup first" >&2
    # Ends the script that sources this when it runs with -e; an interactive shell goes on.
    false
fi
