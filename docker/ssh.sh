#!/usr/bin/env bash
# ssh between the containers of a cluster, none of them root:
#
#     hvdnoise-sshd   runs sshd, on the address of this container's name
#     ssh ...         Debian's ssh, set up to reach the others
#
# A cluster has one key pair: it proves a host to a user and a user to a host, and both
# are checked. It is the id_* in the folder HVDNOISE_SSH (/ssh): mounted, or made there by
# whoever comes first, where the containers share a volume. HVDNOISE_SSH_PORT is 2222.
set -euo pipefail

shared=${HVDNOISE_SSH:-/ssh}
port=${HVDNOISE_SSH_PORT:-2222}
own=~/.cluster-ssh

fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 255
}

the_key() { # prints its name
    local new=$shared/.new.$HOSTNAME.$$ keys
    keys=$(compgen -G "$shared/id_*" | grep -v '\.pub$' || true)
    if [[ -z $keys ]]; then
        [[ -w $shared ]] || fail "no id_* in $shared, and none can be made there; mount a folder with a key (ssh-keygen -t ed25519 -N '' -f id_ed25519), or a volume that user $EUID may write"
        ssh-keygen -q -t ed25519 -N '' -C hvdnoise -f "$new"
        ln "$new" "$shared/id_ed25519" 2>/dev/null || true # or another container was first
        rm -f "$new" "$new.pub"
        keys=$shared/id_ed25519
    fi
    [[ -r ${keys%%$'\n'*} ]] || fail "user $EUID may not read ${keys%%$'\n'*}; give it to that user or group"
    printf '%s\n' "${keys%%$'\n'*}"
}

set_up() ( # $own, in one piece, by one process at a time
    flock 9
    key=$(the_key)
    ! cmp -s "$key" "$own/id" || exit 0 # another ssh has just done it
    part=$(mktemp -d "$own.XXXXXX")
    install -m 600 "$key" "$part/id" # a mounted secret's mode is often too wide for ssh
    ssh-keygen -y -f "$part/id" >"$part/id.pub" || fail "$key is no private key without passphrase"
    echo "* $(<"$part/id.pub")" >"$part/known_hosts"
    cat >"$part/ssh_config" <<END
Port $port
IdentityFile $own/id
IdentitiesOnly yes
UserKnownHostsFile $own/known_hosts
BatchMode yes
ConnectTimeout 10
LogLevel ERROR
ServerAliveInterval 5
END
    cat >"$part/sshd_config" <<END
Port $port
$(printf 'ListenAddress %s\n' ${HVDNOISE_SSH_LISTEN:-$(hostname -i)} | sort -u)
HostKey $own/id
AuthorizedKeysFile $own/id.pub
AuthenticationMethods publickey
UsePAM no
PidFile none
MaxStartups 1000
SetEnv PATH=$PATH
END
    rm -rf "$own"
    mv -T "$part" "$own"
) 9>"$own.lock"

case $(basename "$0") in
    ssh)
        [[ -d $own ]] || set_up
        # Before the arguments: Horovod asks for no check of host keys, and the first word counts.
        exec /usr/bin/ssh -F "$own/ssh_config" -o StrictHostKeyChecking=yes "$@" ;;
    *)
        set_up
        exec /usr/sbin/sshd -D -e -f "$own/sshd_config" ;;
esac
