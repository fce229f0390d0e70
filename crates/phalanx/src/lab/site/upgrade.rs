//! An upgrade as docs/operating/upgrade.md tells it: one member after the other, each once the members say that one may go.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::super::scenario::Action;
use super::Lab;
use crate::config::ForwarderKind;

/// A member that leaves waits for nobody for longer than 30 s, and then goes within 10 s (docs/operating/member-out.md).
const GONE_WITHIN: Duration = Duration::from_secs(45);

impl Lab {
    /// Stops every member that runs and starts it again, one after the other.
    pub(super) fn upgrade(&mut self) -> Result<()> {
        let running = self.members.iter().filter(|member| member.has_process()).map(|member| member.id);
        for id in running.collect::<Vec<_>>() {
            if !self.wait_until_protected()? {
                break;
            }
            let what = format!("upgrade {id}");
            self.open_window(&what);
            self.say(&what);
            self.last_event = what;
            match self.options.forwarder {
                // Its flows outlive it.
                ForwarderKind::Xdp => self.carry_out(Action::Restart(id))?,
                ForwarderKind::Rawsock => {
                    self.carry_out(Action::Leave(id))?;
                    self.wait_until_gone(id)?;
                    self.carry_out(Action::Join(Some(id)))?;
                }
            }
        }
        self.wait_until_protected().map(drop)
    }

    fn wait_until_gone(&mut self, id: u32) -> Result<()> {
        let begun = Instant::now();
        while self.member(id)?.1.has_process() && !self.is_interrupted() {
            if begun.elapsed() > GONE_WITHIN {
                bail!("it does not go within {GONE_WITHIN:?}{}", self.member(id)?.1.last_words());
            }
            self.step()?;
        }
        Ok(())
    }
}
