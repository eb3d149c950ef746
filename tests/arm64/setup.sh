#!/usr/bin/env bash
# Download an ARM emulator, a Python for arm64 and its wheels from Debian and PyPI to a folder.
# The script changes nothing outside the folder and does not need root.
#     tests/arm64/setup.sh FOLDER PYTHON    (PYTHON has ai-edge-litert installed)
set -euo pipefail
python=$(realpath -s "$2")
mkdir -p "$1"
cd "$1"

# Use a separate apt state without installed packages, so that apt downloads every dependency.
mkdir -p apt/lists/partial apt/cache/archives/partial apt/state
: >apt/status
arm=(-qq -o APT::Architecture=arm64 -o APT::Architectures=arm64
	-o Dir::State="$PWD/apt/state" -o Dir::State::Lists="$PWD/apt/lists"
	-o Dir::State::status="$PWD/apt/status" -o Dir::Cache="$PWD/apt/cache"
	-o Debug::NoLocking=1 -o APT::Sandbox::User=)
apt-get "${arm[@]}" update
apt-get "${arm[@]}" install --yes --download-only --no-install-recommends \
	python3-minimal libpython3-stdlib libstdc++6
for package in apt/cache/archives/*.deb; do dpkg-deb -x "$package" root; done

host=(-qq -o Dir::State::Lists="$PWD/apt/host" -o Dir::Cache="$PWD/apt/cache" -o APT::Sandbox::User=)
mkdir -p apt/host/partial
apt-get "${host[@]}" update
apt-get "${host[@]}" download qemu-user-static
dpkg-deb --fsys-tarfile qemu-user-static_*.deb | tar -x --strip-components=3 ./usr/bin/qemu-aarch64-static

# XNNPACK reads this file and aborts without it.
mkdir -p root/proc
cat >root/proc/cpuinfo <<'CPU'
processor	: 0
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x3
CPU part	: 0xd0c
CPU revision	: 1
CPU

versions=$("$python" -c "
from importlib.metadata import version
print(*(f'{name}=={version(name)}' for name in ('ai-edge-litert', 'numpy')))")
# shellcheck disable=SC2086
"$python" -m pip install -q --target site --only-binary=:all: --implementation cp \
	--python-version "$(basename root/usr/bin/python3.* | sed s/python//)" \
	--platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
	--platform manylinux2014_aarch64 $versions
rm -r apt qemu-user-static_*.deb
touch ready
