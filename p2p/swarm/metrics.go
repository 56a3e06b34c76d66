package swarm

import "github.com/prometheus/client_golang/prometheus"

// metrics are what an operator watches.
type metrics struct {
	sent     prometheus.Counter
	received prometheus.Counter
	faults   *prometheus.CounterVec
}

// newMetrics registers the metrics of s, where there is a registry.
func newMetrics(registry prometheus.Registerer, s *Swarm) *metrics {
	m := &metrics{
		sent: prometheus.NewCounter(
			prometheus.CounterOpts{Name: "dfcache_swarm_sent_bytes_total", Help: "Bytes of blobs sent to peers."}),
		received: prometheus.NewCounter(
			prometheus.CounterOpts{Name: "dfcache_swarm_received_bytes_total",
				Help: "Bytes of blobs received from peers, also such as proved wrong."}),
		faults: prometheus.NewCounterVec(
			prometheus.CounterOpts{Name: "dfcache_swarm_faults_total", Help: "Lies, by the peer that was caught."},
			[]string{"peer"}),
	}
	if registry != nil {
		registry.MustRegister(m.sent, m.received, m.faults,
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{
				Name: "dfcache_swarm_peers", Help: "Peers that are connected."}, func() float64 {
				return float64(len(s.network.Connected()))
			}),
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "dfcache_swarm_silent_peers",
				Help: "Peers that do not answer, and that nobody waits for."}, func() float64 {
				return float64(s.peers.silent())
			}),
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "dfcache_swarm_questions", Help: "Questions to peers " +
				"and searches that are under way, also such as nobody waits for any more."}, func() float64 {
				return float64(s.questions.late.count() + s.client.late.count())
			}),
			prometheus.NewGaugeFunc(prometheus.GaugeOpts{
				Name: "dfcache_swarm_downloads", Help: "Blobs that are being fetched."}, func() float64 {
				s.downloads.mu.Lock()
				defer s.downloads.mu.Unlock()
				return float64(len(s.downloads.all))
			}))
	}
	return m
}
