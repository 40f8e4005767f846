# Container of the harness. The container has namespaces of its own for processes, mounts, names and messages, a root
# that holds only the programs and the volumes, and the user of the pod. $1 is the folder with the pod's settings; the
# remaining arguments are the program. The script runs as the first process of a fresh PID namespace, within the pod's
# network namespace.
set -euo pipefail
pod=$1
shift
root=$pod/root
umask 022
ulimit -n 1048576 2>/dev/null || true  # as a container runtime's
hostname "$(cat "$pod/hostname")"
mount --make-rprivate /
mount -t tmpfs -o mode=755,size=16m root "$root"
mkdir -p "$root"/{proc,dev,sys,etc,tmp,run,var/run,var/lib,root}
chmod 1777 "$root/tmp"
for name in bin sbin lib lib32 lib64 libx32 usr; do
    if [ -L "/$name" ]; then cp -P "/$name" "$root/$name"
    elif [ -d "/$name" ]; then mkdir -p "$root/$name"; mount --rbind "/$name" "$root/$name"; fi
done
for file in passwd group nsswitch.conf alternatives protocols services ld.so.cache; do
    if [ -e "/etc/$file" ]; then cp -a "/etc/$file" "$root/etc/$file"; fi
done
read -r user group < "$pod/user"
echo "pod:x:$user:$group::/tmp:/bin/bash" >> "$root/etc/passwd"
cp "$pod/hosts" "$pod/resolv.conf" "$root/etc/"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o mode=1777,size=64m shm "$root/dev/shm"
while IFS='|' read -r path source mode size; do
    mkdir -p "$root$path"
    if [ -z "$source" ]; then
        mount -t tmpfs -o "mode=1777,size=$size" memory "$root$path"
    else
        mount --bind "$source" "$root$path"
        if [ "$mode" = ro ]; then mount -o remount,bind,ro "$root$path"; fi
    fi
done < "$pod/mounts"
# The programs are mounted after the volumes, since a checkout below /tmp lies inside a volume. A folder that only its
# owner may enter, as `mktemp -d` makes it, is bound entry by entry, since pods have users of their own.
while read -r folder; do
    mkdir -p "$root$folder"
    if [ $(($(stat -c '0%a' "$folder") & 5)) = 5 ]; then mount --rbind "$folder" "$root$folder"; continue; fi
    for entry in "$folder"/* "$folder"/.[!.]*; do
        if [ -L "$entry" ]; then cp -P "$entry" "$root$entry"
        elif [ -d "$entry" ]; then mkdir -p "$root$entry"; mount --rbind "$entry" "$root$entry"
        elif [ -f "$entry" ]; then : > "$root$entry"; mount --bind "$entry" "$root$entry"; fi
    done
done < "$pod/programs"
mapfile -d '' -t environment < "$pod/environment"
mount -o remount,bind,ro "$root"
exec chroot "$root" setpriv --reuid "$user" --regid "$group" --clear-groups --no-new-privs --inh-caps=-all \
    --bounding-set=-all env -i "${environment[@]}" "$@"
