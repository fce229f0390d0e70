//! What the members know of a connection that broke, asked at once: later they have forgotten it.

use phalanx_admin::Explain;

use super::super::metrics;
use super::Lab;

/// More of them than this are only counted: they broke for the same reason, and asking delays the lab.
const TOLD: usize = 20;

impl Lab {
    /// Says which connections broke since the last call, and what each member says of them.
    pub(super) fn tell_broken(&mut self) {
        let Some(traffic) = self.traffic.as_ref().filter(|_| self.options.progress) else { return };
        if traffic.ledger().counts().broken as usize <= self.told_broken.len()
            || self.told_broken.len() >= TOLD
        {
            return;
        }
        for broken in traffic.ledger().broken() {
            if self.told_broken.len() >= TOLD || !self.told_broken.insert(broken.id) {
                continue;
            }
            let kind = broken.live.map_or("connecting", |live| live.kind.name());
            let backend = broken.backend.map_or_else(|| "none".to_owned(), |backend| backend.to_string());
            self.say(&format!(
                "broken: connection {} ({kind}, backend {backend}): {}",
                broken.id, broken.cause
            ));
            let Some(live) = broken.live else { continue };
            let path = format!("/v1/explain?src={}&dst={}&protocol=tcp", live.source, self.world.target());
            for (index, member) in self.members.iter().enumerate().filter(|(_, member)| member.has_process())
            {
                let answer: Option<Explain> = metrics::ask(&self.world.members[index].netns, &path);
                let said = answer.as_ref().map_or_else(|| "no answer".to_owned(), sentence);
                self.say(&format!("  member {}: {said}", member.id));
            }
        }
    }
}

/// One line of what a member says.
fn sentence(explain: &Explain) -> String {
    let id = |id: Option<u32>| id.map_or_else(|| "none".to_owned(), |id| id.to_string());
    let holders: Vec<String> = explain
        .holders
        .iter()
        .map(|holder| {
            let recovered = if holder.recovered { ", recovered" } else { "" };
            format!(
                "{} ({}): {}, {}{recovered}, idle {} ms",
                holder.member, holder.role, holder.backend, holder.state, holder.idle_ms
            )
        })
        .collect();
    format!(
        "row {}, owner {}, backup {}, acting owner {}, consistent {}; held by {}",
        explain.row,
        id(explain.owner),
        id(explain.backup),
        id(explain.acting_owner),
        explain.consistent_backend.map_or_else(|| "none".to_owned(), |backend| backend.to_string()),
        if holders.is_empty() { "nobody".to_owned() } else { holders.join("; ") },
    )
}
