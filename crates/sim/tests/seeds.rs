//! Runs of the simulator that show that the simulator itself can be trusted.

use phalanx_sim::runner::{self, Options};

#[test]
fn the_same_seed_gives_the_same_run() {
    let options = Options { story: true, ..Options::default() };
    for seed in [3, 17] {
        let [one, other] = [(); 2].map(|()| runner::run(seed, options));
        assert!(one.story.len() > 100, "a story of {} lines", one.story.len());
        assert_eq!(one.story, other.story);
        assert_eq!((one.packets, one.opened), (other.packets, other.opened));
    }
}

#[test]
fn a_third_of_the_live_flows_sit_off_the_consistent_choice() {
    for seed in 0..8 {
        let report = runner::run(seed, Options::default());
        assert!(
            report.off_choice * 3 >= report.live && report.live > 20,
            "seed {seed}: {} of {}",
            report.off_choice,
            report.live
        );
    }
}
