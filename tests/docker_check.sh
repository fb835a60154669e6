#!/usr/bin/env bash
# usage: make docker-check
#
# Build the image of the Dockerfile where there is no Docker engine, and use it as its own user: buildah runs the steps
# in a chroot, on a Debian that debootstrap makes. Needs root, debootstrap, buildah and, for a while, 40 GB of disk; takes ten minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
export BUILDAH_ISOLATION=chroot

base=$(sed -n 's/^FROM \(debian:[^ ]*\).*/\1/p' Dockerfile | sort --unique)
[[ $base == debian:12.*-slim ]] || { echo "docker_check.sh: one Debian 12 is expected in the Dockerfile, not: $base" >&2; exit 1; }
work=$(mktemp -d)
containers=()
images=()
cleanup() {
  rm -rf "$work"
  [[ ${#containers[@]} == 0 ]] || buildah rm "${containers[@]}" > /dev/null
  [[ ${#images[@]} == 0 ]] || buildah rmi "${images[@]}" > /dev/null
}
trap cleanup EXIT

debootstrap --variant=minbase bookworm "$work/base" > "$work/debootstrap.log" || { cat "$work/debootstrap.log" >&2; exit 1; }
# How this machine reaches its package index: nothing where it needs no settings.
for path in /etc/pip.conf /usr/local/share/ca-certificates; do
  [[ ! -e $path ]] || cp -rT "$path" "$work/base$path"
done
container=$(buildah from scratch)
containers+=("$container")
buildah add --quiet "$container" "$work/base" /
buildah commit --quiet --rm "$container" "docker.io/library/$base"
containers=()
images=("docker.io/library/$base")

buildah build --pull-never --build-arg DATA=shapes10 --tag localhost/fastresnet .
images+=(localhost/fastresnet)

container=$(buildah from --pull-never localhost/fastresnet)
containers+=("$container")
read -ra entrypoint <<< "$(buildah inspect --format '{{range .OCIv1.Config.Entrypoint}}{{.}} {{end}}' "$container")"
fastresnet() {
  echo "+ docker run fastresnet $*"
  buildah run "$container" -- "${entrypoint[@]}" "$@"
}
[[ $(buildah run "$container" -- id --user) != 0 ]] || { echo "docker_check.sh: the image runs as root" >&2; exit 1; }
fastresnet doctor
fastresnet train smoke --data shapes10
fastresnet train smoke --data shapes10 --iterations 20 --compile on --out /runs/compiled
fastresnet prepare --data shapes10 --formats beton
for pipeline in dali ffcv torchvision; do
  fastresnet train smoke --data shapes10 --iterations 20 --pipeline "$pipeline" --out "/runs/$pipeline"
done
buildah run "$container" -- sh -c 'ls -A /runs /runs/.cache /runs/.cache/fastresnet && du -sh /opt/fastresnet /usr'

# Any user, with folders of its own, without capabilities, with a read-only root, and with Docker's default of --tmpfs /tmp,
# from which no code can be loaded. buildah has no option for that.
container=$(buildah from --pull-never localhost/fastresnet)
containers+=("$container")
root=$(buildah mount "$container")
mapfile -t environment < <(buildah inspect --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$container" | grep .)
echo "+ docker run --user 1234:1234 --cap-drop ALL --security-opt no-new-privileges --read-only --tmpfs /tmp fastresnet"
unshare --mount bash -euc '
  root=$0
  mount --bind "$root" "$root"
  mount --options remount,bind,ro "$root"
  if touch "$root/written" 2> /dev/null; then exit 1; fi
  mount --types proc proc "$root/proc"
  mount --rbind /dev "$root/dev"
  mount --types tmpfs --options noexec,nosuid,nodev,mode=1777 tmpfs "$root/tmp"
  for volume in data runs; do mount --types tmpfs --options mode=755,uid=1234,gid=1234 tmpfs "$root/$volume"; done
  exec chroot "$root" setpriv --reuid 1234 --regid 1234 --clear-groups --bounding-set=-all --inh-caps=-all --no-new-privs \
    env --ignore-environment --chdir=/runs HOME=/ "$@"
' "$root" "${environment[@]}" bash -euc '
  fastresnet doctor
  fastresnet train smoke --data shapes10 --iterations 2 --compile on --out run 2> notes
  cat notes
  if grep "compiled code\|C compiler" notes; then exit 1; fi
  fastresnet plot run
'
buildah umount "$container" > /dev/null
echo "The image builds and works."
