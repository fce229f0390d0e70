//! Root, or root of a user namespace of our own.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// Set in the environment of the program that runs again in its user namespace.
const MARK: &str = "PHALANX_LAB_ROOTLESS";

/// Makes sure that the caller may make network namespaces: as root nothing happens, otherwise the program starts again in a user
/// namespace in which it is root, with the same arguments, and this never returns.
///
/// Call it while the process has one thread.
pub fn become_root() -> Result<()> {
    // SAFETY: these calls have no preconditions and cannot fail.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    if uid == 0 {
        return Ok(());
    }
    if std::env::var_os(MARK).is_some() {
        bail!("the user namespace did not make this process root: run the lab as root");
    }
    // SAFETY: unshare takes no pointers; it fails in a process of several threads.
    if unsafe { libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET | libc::CLONE_NEWNS) } != 0 {
        return Err(io::Error::last_os_error()).context(
            "this kernel does not let you make a user namespace (look at /proc/sys/user/max_user_namespaces and at \
             kernel.apparmor_restrict_unprivileged_userns): run the lab as root",
        );
    }
    // A group map by an unprivileged process is allowed only after giving up setgroups (user_namespaces(7)).
    fs::write("/proc/self/setgroups", "deny").context("cannot give up setgroups")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1")).context("cannot map the user")?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1")).context("cannot map the group")?;
    let program = std::env::current_exe()?;
    let error = Command::new(program).args(std::env::args_os().skip(1)).env(MARK, "1").exec();
    Err(error).context("cannot start again in the user namespace")
}

/// Lets the process open as many files as the system allows, and says whether `wanted` is within that.
pub fn raise_file_limit(wanted: u64) -> Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a live rlimit.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error()).context("cannot read the limit of open files");
    }
    if limit.rlim_max < wanted {
        // Root may raise the hard limit too; whether it could is seen below.
        let raised = libc::rlimit { rlim_cur: wanted, rlim_max: wanted };
        // SAFETY: the pointer is to a live rlimit.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) } == 0 {
            return Ok(());
        }
        bail!(
            "the lab needs {wanted} open files and the limit is {}: raise it (ulimit -Hn) or open fewer connections",
            limit.rlim_max
        );
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the pointer is to a live rlimit.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error()).context("cannot raise the limit of open files");
    }
    Ok(())
}
