# Sourced by the scripts here: goes to the root of the clone, sets everything up and exports the environment.
# Every cargo call is --release --locked: RocksDB costs a quarter of an hour per profile.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s\n' "$*"; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 2; }

# rust-toolchain.toml names the compiler. Where rustup may not fetch it, the installed one serves.
choose_toolchain() {
    [ -z "${RUSTUP_TOOLCHAIN:-}" ] || return 0
    cargo --version >/dev/null 2>&1 && return 0
    local wanted
    wanted=$(sed -n 's/^channel = "\(.*\)"/\1/p' rust-toolchain.toml)
    if command -v rustup >/dev/null; then
        rustup toolchain install "$wanted" --profile minimal --component clippy,rustfmt >&2 && return 0
        export RUSTUP_TOOLCHAIN=stable
        cargo --version >/dev/null 2>&1 && say "Rust $wanted cannot be fetched: using $(cargo --version)" >&2 && return 0
        unset RUSTUP_TOOLCHAIN
    fi
    return 0 # dev/setup says what is missing
}

choose_toolchain
./dev/setup
# shellcheck source=dev/env.sh
. ./dev/env.sh
# Nothing here asks questions.
exec </dev/null
