#!/bin/sh
# Install what the set-up needs from Debian's or Ubuntu's packages, and only what is missing.
set -eu

missing=""
need() { missing="$missing $1"; }

ldconfig -p | grep -q 'libvulkan\.so\.1' || need libvulkan1
# Any driver will do; lavapipe runs on every machine and is what the tests are written for.
ls /usr/share/vulkan/icd.d/lvp_icd*.json >/dev/null 2>&1 || need mesa-vulkan-drivers
ls /usr/share/vulkan/explicit_layer.d/VkLayer_khronos_validation.json >/dev/null 2>&1 || need vulkan-validationlayers
"${PYTHON:-python3}" -c 'import ensurepip, venv' >/dev/null 2>&1 || need python3-venv

[ -n "$missing" ] || exit 0
if ! command -v apt-get >/dev/null 2>&1; then
    echo "These are missing and apt-get is not here; install your system's counterparts:$missing" >&2
    exit 1
fi
as_root=""
[ "$(id -u)" = 0 ] || as_root="sudo"
echo "Installing$missing"
$as_root apt-get update -qq
# shellcheck disable=SC2086  # a list of packages
DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends $missing
