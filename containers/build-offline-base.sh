#!/usr/bin/env bash
# Builds a base image for containers/Dockerfile where no image registry can be reached:
#
#   containers/build-offline-base.sh [IMAGE]          default: netsense-base:offline
#   BASE_IMAGE=netsense-base:offline docker compose build
#
# Needs mmdebstrap, and a Debian mirror in this machine's apt sources. What this machine needs in order to install
# packages (certificates, proxy, pip's settings, local wheels) goes into the image, so do not publish it.
set -euo pipefail

image=${1:-netsense-base:offline}
suite=${SUITE:-bookworm}
docker=${DOCKER:-docker}

fail() {
    echo "build-offline-base: $*" >&2
    exit 1
}
command -v mmdebstrap >/dev/null || fail "mmdebstrap is missing; install it: apt-get install mmdebstrap"
command -v "$docker" >/dev/null || fail "docker is missing"

# The mirror is the one that this machine uses itself.
# shellcheck disable=SC2016  # $(REPO_URI) is apt's, not the shell's
mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI) $(ORIGIN) $(COMPONENT)' 'Created-By: Packages' |
    awk '$1 !~ /security/ && $NF == "main" && ($2 == "Debian" || $1 ~ /\/debian\/?$/) { print $1; exit }')}
[ -n "$mirror" ] || fail "no Debian mirror in the apt sources; name one with DEBIAN_MIRROR"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
files=$work/files
mkdir -p "$files/etc/ssl/certs" "$files/usr/local/share/ca-certificates"

# Behind a proxy that opens TLS, only this machine's own bundle of certificates is of use.
inside_bundle=/etc/ssl/certs/ca-certificates.crt
for bundle in "${PIP_CERT:-}" "${SSL_CERT_FILE:-}" "${REQUESTS_CA_BUNDLE:-}" "$inside_bundle"; do
    if [ -f "$bundle" ]; then
        cp -L "$bundle" "$files$inside_bundle"
        break
    fi
done
find /usr/local/share/ca-certificates -name '*.crt' -exec cp -L {} "$files/usr/local/share/ca-certificates/" \; || true

# pip's settings, of which files and the environment are two sources with the same keys (the environment wins).
python=$(command -v python3 || true)
setting() {
    [ -n "$python" ] || return 0
    "$python" -m pip config list 2>/dev/null |
        awk -F= -v key="$1" '{ name = $1; sub(/^[^.]*\./, "", name); sub(/^\./, "", name) }
             name == key { value = substr($0, index($0, "=") + 1); gsub(/^\x27|\x27$/, "", value)
                           if ($0 ~ /^:env:/) env = value; else file = value }
             END { print (env != "" ? env : file) }'
}
{
    echo "[global]"
    echo "cert = $inside_bundle"
    for key in index-url trusted-host proxy default-timeout; do
        value=$(setting "$key")
        [ -z "$value" ] || echo "$key = $value"
    done
    indexes=()
    for url in $(setting extra-index-url); do
        case $url in
        file:*) echo "build-offline-base: leaving out the local index $url" >&2 ;;
        *) indexes+=("$url") ;;
        esac
    done
    [ ${#indexes[@]} -eq 0 ] || echo "extra-index-url = ${indexes[*]}"
    wheels=()
    for place in $(setting find-links); do
        if [ -d "${place#file://}" ]; then
            place=${place#file://}
            mkdir -p "$files$place"
            cp -a --reflink=auto "$place/." "$files$place/"
        fi
        wheels+=("$place")
    done
    [ ${#wheels[@]} -eq 0 ] || echo "find-links = ${wheels[*]}"
} >"$work/pip.conf"
mv "$work/pip.conf" "$files/etc/pip.conf"
chmod -R a+rX "$files"

# An image of the same making is used again, and so are the layers that were built on it.
made_from=$({
    cat "$0"
    echo "$suite $mirror"
    env | grep -i '_proxy=' | sort || true
    find "$files" -type f -size +1M -printf '%P %s\n' | sort
    find "$files" -type f -size -1025k -exec sha256sum {} + | sort
} | sed "s|$work||" | sha256sum | cut -c1-16)
label=netsense.base
if [ "$("$docker" image inspect --format "{{index .Config.Labels \"$label\"}}" "$image" 2>/dev/null)" = "$made_from" ]; then
    echo "$image: is up to date"
    exit 0
fi

changes=(--change "LABEL $label=$made_from" --change "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin" --change "ENV LANG=C.UTF-8"
    --change "ENV PIP_DISABLE_PIP_VERSION_CHECK=1" --change "ENV SSL_CERT_FILE=$inside_bundle"
    --change "CMD [\"python3\"]")
for name in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY; do
    [ -z "${!name:-}" ] || changes+=(--change "ENV $name=${!name}")
done

# A virtual environment is what the Dockerfile makes, so Debian's guard on its own site directory is of no use here.
# shellcheck disable=SC2016  # $1 is the root directory, which mmdebstrap gives to the hook
mmdebstrap --variant=minbase --quiet \
    --include=ca-certificates,python3,python3-venv,python3-pip,python-is-python3 \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --customize-hook="sync-in $files /" \
    --customize-hook='rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED' \
    "$suite" - "deb $mirror $suite main" |
    "$docker" import "${changes[@]}" - "$image" >/dev/null
echo "$image: $("$docker" image inspect --format '{{.Size}}' "$image" | awk '{ printf "%.0f MB", $1 / 1e6 }')"
