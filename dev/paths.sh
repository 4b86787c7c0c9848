# Where dev/setup puts things; sourced by dev/setup and dev/env.sh, defines and exports nothing else.
FARSHORE_CACHE=${FARSHORE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/farshore}
farshore_mongod=$FARSHORE_CACHE/mongod-6.0.5/mongod
farshore_libclang=$FARSHORE_CACHE/libclang-18.1.1
# One stamp per text of dev/setup and per choice of the user, so that clones at different commits share a cache.
farshore_stamp=$FARSHORE_CACHE/setup-$(
    {
        cat "$(dirname "${BASH_SOURCE[0]}")/setup"
        [ "${FARSHORE_MONGOD:-$farshore_mongod}" = "$farshore_mongod" ] || echo "mongod $FARSHORE_MONGOD"
        [ "${LIBCLANG_PATH:-$farshore_libclang}" = "$farshore_libclang" ] || echo "libclang $LIBCLANG_PATH"
    } | sha256sum | cut -c1-16
).env
