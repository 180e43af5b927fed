#!/usr/bin/env bash
# Makes the environment that `make demo` and `make test` run in. `./setup.sh --help` tells how to steer it.
# Kept to bash 3.2, which is what macOS has.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
index_base=${PYTORCH_INDEX_BASE:-https://download.pytorch.org/whl}
builds="12.1 12.4 12.6 12.8 13.0"

usage() {
    cat <<END
Usage: ./setup.sh [options]

Makes a Python environment, puts the PyTorch build that fits this machine's NVIDIA driver into it (or the CPU build),
and installs hymba from this directory. Asks nothing. When all is in place it does nothing, quickly.

  --cuda VERSION   take the build for this CUDA version: ${builds// /, }
  --cpu            take the CPU build
  --extras NAMES   also install these extras of pyproject.toml, separated by commas: data, plots, test, dev
  --python PROGRAM the Python to use, 3.10 to 3.13 (default: python3, else python3.13 down to python3.10)
  --venv DIR       where the environment goes (default: .venv beside this script)
  --dry-run        say what would be done, change nothing
  --help           print this

Without --cuda and --cpu, an environment made earlier keeps its build.
PYTORCH_INDEX_BASE names a mirror of PyTorch's wheel index (now $index_base).

Example: ./setup.sh --cuda 12.4 --extras test
END
}

die() { printf 'setup.sh: %s\n' "$1" >&2; exit "${2:-1}"; }
misuse() { die "$1 (./setup.sh --help lists the options)" 2; }
say() { printf '%-12s %s\n' "$1" "$2"; }

# ---- options -----------------------------------------------------------------------------------------------------

build="" extras="" program="" venv=$root/.venv dry_run=""
while (($#)); do
    case $1 in
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
        --cuda | --extras | --python | --venv)
            [[ -n ${2:-} && ${2:-} != --* ]] || misuse "$1 needs a value" ;;
    esac
    case $1 in
        --cuda)
            [[ " $builds " == *" $2 "* ]] || misuse "--cuda $2: there is a build for ${builds// /, }"
            [[ -z $build || $build == "$2" ]] || misuse "--cuda $2 contradicts an earlier --cuda or --cpu"
            build=$2; shift 2 ;;
        --cpu)
            [[ -z $build || $build == cpu ]] || misuse "--cpu contradicts --cuda $build"
            build=cpu; shift ;;
        --extras) extras=$2; shift 2 ;;
        --python) program=$2; shift 2 ;;
        --venv) venv=$2; [[ $venv == /* ]] || venv=$PWD/$venv; shift 2 ;;
        --dry-run) dry_run=yes; shift ;;
        --help | -h) usage; exit 0 ;;
        *) misuse "unknown option $1" ;;
    esac
done

cd -- "$root"
known_extras=$(sed -n '/^\[project\.optional-dependencies\]/,/^$/ s/ = .*//p' pyproject.toml | tr '\n' ' ')
for extra in ${extras//,/ }; do
    [[ " $known_extras" == *" $extra "* ]] || misuse "--extras $extra: there are ${known_extras% }"
done
platform="$(uname -s) $(uname -m)"
case $platform in
    "Darwin x86_64") die "PyTorch 2.6 and newer have no build for Intel Macs" ;;
    Darwin*) [[ -z $build || $build == cpu ]] || misuse "--cuda $build: there is no CUDA on macOS" ;;
esac

# ---- which Python ------------------------------------------------------------------------------------------------

# Prints "3.11", say; fails for what is no working Python (such as a version manager's shim with nothing behind it).
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

in_range() {
    case $1 in 3.10 | 3.11 | 3.12 | 3.13) return 0 ;; *) return 1 ;; esac
}

# An environment is usable when its Python starts and has pip; one whose making was cut short is made anew.
have_venv=""
if [[ -x $venv/bin/python ]] && "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    have_venv=yes
    version=$(version_of "$venv/bin/python")
    in_range "$version" || die "$venv holds Python $version, hymba needs 3.10 to 3.13: remove it or name another --venv"
    if [[ -n $program && $(version_of "$program") != "$version" ]]; then
        die "$venv holds Python $version, not that of --python $program: remove it or name another --venv"
    fi
    program=$venv/bin/python
else
    if [[ -e $venv && ! -f $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
        die "$venv exists and is no Python environment: name another --venv"
    fi
    if [[ -n $program ]]; then
        version=$(version_of "$program") || misuse "--python $program: not a working Python"
        in_range "$version" || misuse "--python $program is Python $version, hymba needs 3.10 to 3.13"
    else
        for program in python3 python3.13 python3.12 python3.11 python3.10 ""; do
            [[ -n $program ]] || die "found no Python 3.10 to 3.13: install one, or name it with --python"
            if version=$(version_of "$program") && in_range "$version"; then break; fi
        done
    fi
    "$program" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$program cannot make environments: install its venv package (on Debian and Ubuntu: python$version-venv)"
fi

# ---- which PyTorch -----------------------------------------------------------------------------------------------

# Prints the newest CUDA version that the NVIDIA driver supports, nothing if there is no driver or no GPU.
driver_cuda() {
    # "CUDA Version: 12.4", or "CUDA UMD Version: 13.3" as newer drivers print it
    local header pattern='CUDA ([A-Z]+ )?Version *: *([0-9]+\.[0-9]+)'
    if header=$(nvidia-smi 2>/dev/null) && [[ $header =~ $pattern ]]; then
        printf '%s\n' "${BASH_REMATCH[2]}"
        return
    fi
    # containers may come without nvidia-smi: ask the driver's library itself
    "$program" - 2>/dev/null <<'END'
import ctypes

count, version = ctypes.c_int(), ctypes.c_int()
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    raise SystemExit
# cuInit fails where the library lies around but no GPU is
failed = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or cuda.cuDriverGetVersion(ctypes.byref(version))
if not failed and count.value:
    print(f"{version.value // 1000}.{version.value % 1000 // 10}")
END
}

# True if a GPU here is older than Turing (compute capability 7.5).
has_old_gpu() {
    nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
        awk '/^[0-9]+\.[0-9]+$/ && $1 < 7.5 { old = 1 } END { exit !old }'
}

# The newest build that is not newer than the driver. Within a major version of CUDA a newer build runs on an older
# driver too (minor-version compatibility, CUDA 12: driver 525 and newer), but what it compiles to PTX at run time may
# not, so the nearest one is the safest. Newer drivers run all older builds.
fitting_build() {
    local number=$((${1%.*} * 100 + ${1#*.}))
    if ((number >= 1300)); then echo 13.0
    elif ((number >= 1208)); then echo 12.8
    elif ((number >= 1206)); then echo 12.6
    elif ((number >= 1204)); then echo 12.4
    elif ((number >= 1200)); then echo 12.1
    else echo cpu; fi
}

if [[ -n $build ]]; then
    why="as told"
elif [[ -f $venv/hymba-setup/build ]]; then
    build=$(<"$venv/hymba-setup/build")
    why="as in the environment already; --cuda and --cpu change it"
elif [[ $platform == Darwin* ]]; then
    build=cpu why="on macOS one build serves the CPU and Metal"
else
    driver=$(driver_cuda || true)
    if [[ -z $driver ]]; then
        build=cpu why="no NVIDIA driver with a GPU was found"
    else
        build=$(fitting_build "$driver")
        why="the NVIDIA driver supports CUDA $driver"
        if [[ $build == cpu ]]; then
            why="$why only; PyTorch's CUDA builds need 12.0, that is driver 525 or newer"
        elif [[ $build == 13.0 || $build == 12.8 ]] && has_old_gpu; then
            # the builds for 12.8 and 13.0 have left out the GPUs before Turing
            build=12.6 why="$why, and a GPU here is older than the newer builds serve"
        fi
    fi
fi

# The newest PyTorch that was published for each CUDA version, as far as 2.13: 12.1 ended with 2.5, 12.4 with 2.6,
# 12.8 with 2.11; 12.6 and 13.0 go on. hymba needs 2.6, so 12.1 gets the build for 12.4: see fitting_build.
case $build in
    12.1 | 12.4) torch=2.6.0+cu124 ;;
    12.6) torch=2.13.0+cu126 ;;
    12.8) torch=2.11.0+cu128 ;;
    13.0) torch=2.13.0+cu130 ;;
    cpu) torch=2.13.0+cpu ;;
    *) die "$venv/hymba-setup/build names no build: remove $venv" ;;
esac
case $platform in
    Darwin*) torch=${torch%+*} ;;  # on PyPI, without a label
    "Linux aarch64") [[ $torch != *cu124 ]] || torch=2.13.0+cu126 ;;  # there are none for ARM before 12.6
esac
if [[ $torch == *+cu* && $torch != *+cu${build/./} ]]; then
    why="$why; PyTorch 2.6 and newer have no build for $build here, but every CUDA 12 driver runs this one"
    why="$why, save that PTX made at run time may need a newer driver"
fi

# ---- what is there, what is to do --------------------------------------------------------------------------------

# The environment remembers what it was made from: one file for each extra, which holds this key. Python files are read
# in place, so only what decides the installation counts: this script, the project file, sources that get compiled.
inputs=(-name 'setup.*' -o -name '*.toml' -o -name '*.cpp' -o -name '*.h')
key="torch==$torch $root $(find setup.* pyproject.toml hymba \( "${inputs[@]}" \) -exec cksum {} + | sort | cksum)"
recorded() { [[ $(cat "$venv/hymba-setup/$1" 2>/dev/null) == "$key" ]]; }

has_torch() { compgen -G "$venv/lib/python*/site-packages/torch-$torch.dist-info" >/dev/null; }

up_to_date=$have_venv
has_torch || up_to_date=""
for extra in project ${extras//,/ }; do
    recorded "$extra" || up_to_date=""
done

if [[ $up_to_date && -z $dry_run ]]; then
    exit 0
fi
say python "$version ($program)"
say pytorch "torch==$torch ($why)"
say environment "$venv$([[ $have_venv ]] || echo ' (new)')"
say project "hymba, editable${extras:+, with extras $extras}"
if [[ $dry_run ]]; then
    if [[ $up_to_date ]]; then say status "all in place"; else say status "dry run, nothing was changed"; fi
    exit 0
fi

# ---- do it -------------------------------------------------------------------------------------------------------

export PIP_USER=no  # a user's setting that would lead out of the environment
pip() { "$venv/bin/python" -m pip --no-input --disable-pip-version-check "$@" </dev/null; }

[[ $have_venv ]] || "$program" -m venv --clear "$venv" || die "could not make an environment in $venv"
recorded project || rm -rf "$venv/hymba-setup"  # made from something else: none of it counts any more
mkdir -p "$venv/hymba-setup"
printf '%s\n' "$build" >"$venv/hymba-setup/build"

# PyTorch comes first, so that nothing else brings another one: on Linux the plain `torch` of PyPI is a CUDA build of
# gigabytes. A label such as "+cpu" names one build and is never on PyPI; it is on PyTorch's own index, or nearer: a
# directory of wheels or a mirror that pip is set up to look at. So pip's own sources are asked first, which costs one
# look-up, and lets a machine on a closed network install what lies there.
if [[ $platform == Darwin* ]]; then
    has_torch || pip install "torch==$torch" || die "could not install torch==$torch; see pip's message above"
elif ! has_torch && ! pip install "torch==$torch" 2>/dev/null; then
    index=$index_base/${torch#*+}
    pip install "torch==$torch" --index-url "$index" ||
        die "could not install torch==$torch from $index; see pip's message above"
fi

# the constraint keeps this build, whatever the other requirements would prefer
printf 'torch==%s\n' "$torch" >"$venv/hymba-setup/constraints.txt"
pip install --quiet --constraint "$venv/hymba-setup/constraints.txt" --editable ".${extras:+[$extras]}" ||
    die "could not install hymba; see pip's message above"

"$venv/bin/python" - <<'END' || die "the installed PyTorch does not start; remove $venv and try again"
import torch

no_gpu = torch.version.cuda is not None and not torch.cuda.is_available()
print(f"{'ready':<12} PyTorch {torch.__version__}{', which finds no usable GPU here' if no_gpu else ''}")
END
for extra in project ${extras//,/ }; do
    printf '%s\n' "$key" >"$venv/hymba-setup/$extra"
done
