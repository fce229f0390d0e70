//! Signals that the daemon takes.

use std::path::{Path, PathBuf};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::control::Request;
use crate::config::Config;

/// Lets a SIGHUP wait until the daemon runs: whoever has just written a configuration tells all members, those that are starting too,
/// and an unhandled SIGHUP ends a process. Call it before there is a second thread: those begin with the mask of their maker.
pub fn hold_reloads() {
    mask_hangup(libc::SIG_BLOCK);
}

/// Blocks SIGHUP for the calling thread, or lets it come.
fn mask_hangup(how: i32) {
    // SAFETY: the set is plain bits that the first call makes, and lives through the others.
    unsafe {
        let mut hangup: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut hangup);
        libc::sigaddset(&raw mut hangup, libc::SIGHUP);
        libc::pthread_sigmask(how, &raw const hangup, std::ptr::null_mut());
    }
}

/// SIGHUP reloads, SIGTERM and SIGINT leave.
pub(super) fn spawn(file: PathBuf, requests: mpsc::UnboundedSender<Request>) -> anyhow::Result<()> {
    let mut hangup = signal(SignalKind::hangup())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    mask_hangup(libc::SIG_UNBLOCK);
    tokio::spawn(async move {
        loop {
            let request = tokio::select! {
                _ = hangup.recv() => match read_again(&file) {
                    Some(config) => Request::Reload(Box::new(config)),
                    None => Request::ReloadRefused,
                },
                _ = terminate.recv() => Request::Leave,
                _ = interrupt.recv() => Request::Leave,
            };
            if requests.send(request).is_err() {
                return;
            }
        }
    });
    Ok(())
}

/// Reads the configuration again; one with mistakes changes nothing.
fn read_again(file: &Path) -> Option<Config> {
    match Config::load(file) {
        Ok(config) => Some(config),
        Err(errors) => {
            for error in errors {
                tracing::error!("the configuration stays as it was: {error}");
            }
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reload_that_is_asked_for_before_the_daemon_runs_is_made_once_it_does() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            hold_reloads();
            // To this thread alone. Without the call before it, it would end all tests.
            // SAFETY: the thread is our own.
            assert_eq!(unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGHUP) }, 0);
            let (requests, mut asked) = mpsc::unbounded_channel();
            spawn(PathBuf::from("no such file"), requests).expect("signals");
            assert!(matches!(asked.recv().await, Some(Request::ReloadRefused)));
        });
    }
}
